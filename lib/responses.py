"""Scored responses: what is kept of each, and how a terminal shows them.

    + 29: e9 * e3 = e3                          right
    x 30: e3 + e4 = e7                          the first error
        arithmetic; due: 30: e3 + e4 = e0
    . end e7                                    what follows it

A row of RUN/responses.jsonl is one response, with its prompt and what is known of it.
"""

import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from statistics import fmean
from textwrap import wrap

from lib.flags import require_min

RESPONSES = "responses.jsonl"  # in a run's folder
NONE = "none"  # the strategy of a response that follows none, or of which none is known
ARITHMETIC = "arithmetic"  # an error: the result of a line is not operation(value, operand)
GUESS = "wrong guess"  # an error, though no fault of a line: strategy and problem do not match
WIDTH = 80
GREEN, RED, DIM, BOLD = "32", "31", "2", "1"
GROUP = ("update", "split", "problem", "prompt")  # keys that all responses to a prompt share


@dataclass(frozen=True)
class Response:
    """A scored response: its text, and what tables, logs and the viewer say of it."""

    response: str  # its text
    kind: str  # the problem's type
    difficulty: str
    correct: bool  # ended by a stop token and the right answer: what tables count
    stopped: bool  # whether it ended before the token limit
    reward: float = 0.0  # what GRPO trains on
    strategy: str = NONE  # or any label, where the task is not the paper's
    matches: bool | None = None  # whether each part takes the strategy that needs no guess
    guess: bool = False  # whether a part of it opens with a guess
    error: str | None = None  # what went wrong first: a wrong guess, or the kind of a line's error
    error_line: int | None = None  # the first line that is wrong, from 0
    line_error: str | None = None  # what is wrong with it
    due: str | None = None  # the line that was due there

    @property
    def faultless(self) -> bool:
        """Whether it ended and every line of it is right, given what it may have guessed."""
        return self.stopped and self.error_line is None

    @property
    def verified(self) -> bool:
        """Whether it is right, every line of it is, and nothing was guessed."""
        return self.correct and self.error is None and not self.guess


Scored = list[list[Response]]  # for each problem its responses
KINDS = {f.name: float | int if f.type is float else f.type for f in fields(Response)}
KINDS |= {"prompt": str, "answer": str}  # of what a row holds, at least


def by_number(text: str) -> list:
    """Return a key by which "9 steps" comes before "10 steps"."""
    words = re.split(r"([0-9]{1,300})", text)  # text and numbers in turn
    return [int(word) if i % 2 else word for i, word in enumerate(words)]


def accuracy(responses: list[Response]) -> float | None:
    """Return the share of right responses; None if there is no response."""
    return fmean(r.correct for r in responses) if responses else None


def group_by(scored: Scored, key: str) -> dict[str, Scored]:
    """Group problems by an attribute that all responses to one share, sorted; skip empty ones."""
    values = sorted({getattr(group[0], key) for group in scored} - {""}, key=by_number)
    return {v: [group for group in scored if getattr(group[0], key) == v] for v in values}


def response_rows(problems: list, scored: list, advantages=None, **where) -> list[dict]:
    """Return what responses.jsonl holds of each response to each problem, `where` in each row."""
    rows = []
    for i, (problem, group) in enumerate(zip(problems, scored)):
        of_group = where | {"problem": i, "prompt": problem.prompt(), "answer": problem.answer}
        for j, one in enumerate(group):
            advantage = None if advantages is None else float(advantages[i, j])
            rows.append(of_group | {"advantage": advantage} | asdict(one))
    return rows


@dataclass
class ShowConfig:
    place: list = field(default_factory=list)  # a GRPO run, or JSON lines with prompt and response
    update: int | None = None  # only those of this update [a run's last, or with --problem all]
    problem: int | None = None  # only those to this validation problem
    strategy: str = ""  # only those that follow this strategy
    wrong: bool = False  # only wrong ones
    n: int = 2  # how many to each prompt, 0: all
    json: bool = False  # print them as JSON lines
    field: int = 11  # number of elements of the field, where a prompt does not say it


def select(rows: list[dict], config: ShowConfig) -> list[dict]:
    """Return the rows that the flags ask for."""
    require_min(config, n=0)
    update, problem = config.update, config.problem
    if update is None and problem is None and rows:
        update = rows[-1].get("update")
    wanted = {"update": update, "problem": problem, "strategy": config.strategy or None}
    wanted["split"] = None if problem is None else "validation"
    wanted["correct"] = False if config.wrong else None
    given = {key: x for key, x in wanted.items() if x is not None}
    return [row for row in rows if given.items() <= row.items()]


def show(rows: list[dict], lines_of, n: int = 0) -> Iterator[str]:
    """Yield the lines that show each group of rows, of its responses the first n, or all if n is 0.

    `lines_of` splits a response as its tagger does, so that row["error_line"] counts these lines.
    """
    prompt = None
    for keys, group in groupby(rows, key=lambda row: [row.get(key) for key in GROUP]):
        shown = list(group)[: n or None]
        yield from indented("", heading(shown[0]), BOLD)
        if keys[-1] != prompt:
            prompt = keys[-1]
            yield from indented("", " | ".join(prompt.strip().splitlines()), DIM)
        for row in shown:
            yield from ("", *response_lines(row, lines_of(row["response"])), "")


def heading(row: dict) -> str:
    update, number = row.get("update"), row.get("problem")
    words = [f"update {update}:"] if update is not None else []
    words += [row.get("split") or "", f"problem {number}," if number is not None else ""]
    words += [f"{row['kind']},", f"{row['difficulty']}," if row["difficulty"] else ""]
    return " ".join(filter(None, [*words, f"answer {row['answer']}"]))


def response_lines(row: dict, lines: list[str]) -> Iterator[str]:
    """Yield a response's head line, and its lines marked as right, wrong or behind the error."""
    match = {True: " (matches)", False: " (does not match)"}.get(row["matches"], "")
    head = [row["strategy"] + match, "right" if row["correct"] else "wrong"]
    head += [GUESS if row["error"] == GUESS else "guessed"] if row["guess"] else []
    head += [f"reward {row['reward']:g}"] if "update" in row else []  # only a run knows
    known = isinstance(row.get("advantage"), int | float)
    head += [f"advantage {row['advantage']:+.2f}"] if known else []
    head += [] if row["stopped"] else ["cut off"]
    yield from indented("", ", ".join(head), BOLD)
    wrong = row["error_line"]
    for i, line in enumerate(lines):
        judged = row["matches"] is not None
        mark, color = ("+ ", GREEN) if judged else ("  ", "")
        if wrong is not None and i >= wrong:
            mark, color = ("x ", RED) if i == wrong else (". ", DIM)
        yield from indented(mark, line, color)
        if i == wrong:
            yield from fault(row)
    if wrong is not None and wrong >= len(lines):
        yield from fault(row)


def fault(row: dict) -> Iterator[str]:
    """Yield what is wrong with the line above, and what was due instead of it."""
    due = f"due: {row['due']}" if row["due"] else "nothing more was due"
    yield from indented("    ", f"{row['line_error']}; {due}", RED)


def indented(mark: str, text: str, color: str) -> Iterator[str]:
    """Yield a text's lines behind a mark, in colour on a terminal. A model may say anything."""
    indents = {"initial_indent": mark, "subsequent_indent": " " * len(mark)}
    colored = color and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in wrap(printable(text), WIDTH, **indents) or [mark]:
        yield f"\x1b[{color}m{line}\x1b[0m" if colored else line


def printable(text: str) -> str:
    """Replace what would move the cursor or clear the screen."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def composed(text: str) -> str:
    """Return a text without what a tokenizer may change: white space, and letters in two parts."""
    return " ".join(unicodedata.normalize("NFC", text).split())
