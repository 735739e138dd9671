"""The tagger: which strategy a response follows, and where it first goes wrong; and its reward.

It reads text alone, so it works on any model's responses. A response is a sequence of *lines*,
recognised by their form and not by line breaks:

    start e3, end e1, guess end e1     an opening or a closing
    8: e3 + e4 = e0                    a step
    answer e1
    anything between                   a line of another form

Steps vote for a direction by their operation, the opening and the closing by their side: start or
end. The lines are then compared with a faultless solution in that direction.

    python strategies.py ckpt/grpo-hard-gf11                # some responses of the newest update
    python strategies.py ckpt/grpo-hard-gf11 --problem 0    # those to one problem, at each update
    python strategies.py FILE.jsonl --json                  # tag {"prompt", "response"} lines
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from data.finite_field import BACKWARD, FORWARD, MATCHING_STRATEGY, Problem
from data.parse import Line, parse_lines, parse_prompt
from lib.flags import parse_flags, parse_json_lines, quiet_pipes, require, user_errors
from lib.responses import (
    ARITHMETIC,
    GUESS,
    KINDS,
    NONE,
    RESPONSES,
    Response,
    ShowConfig,
    select,
    show,
)

MIXED = "mixed"
STRATEGIES = (FORWARD, BACKWARD, MIXED, NONE)  # what a response can be tagged as

# What can be wrong with a line, beside ARITHMETIC.
OPERAND = "wrong operand"  # a value, operation or operand that is not the one at this point
SKIPPED = "skipped step"  # an expected line is missing; a later one appears instead
ORDER = "wrong order"  # a line out of turn: it came before, or is never due
FORMAT = "format"  # a line of another form
NO_ANSWER = "no answer"  # the response ends before its answer does


@dataclass(frozen=True)
class Error:
    kind: str
    line: int  # which line of the response, from 0
    due: str  # the line that was due there, "" after the last


@dataclass(frozen=True)
class Tag:
    strategy: str  # FORWARD, BACKWARD, MIXED (parts differ, or one is both) or NONE (no step)
    parts: tuple[str, ...]  # the same for each part of the problem
    guessed: tuple[bool, ...]  # which parts open with a guess
    misguessed: bool  # whether a wrong guess comes before the first error
    error: Error | None


def score_rollout(rollout, problems: list, tokenizer) -> None:
    """Score a rollout's responses: set rollout.scored, P lists of G, and its rewards (P, G)."""
    tokens, stopped = rollout.response_tokens(), rollout.stopped.tolist()
    G = len(tokens) // len(problems)
    prefixes = [tokenizer.prefix(problem) for problem in problems]
    texts = tokenizer.decode([prefixes[j // G] + row for j, row in enumerate(tokens)])
    rollout.problems, rollout.scored = problems, []
    for i, problem in enumerate(problems):
        group = range(i * G, (i + 1) * G)
        rollout.scored.append([score_response(problem, texts[j], stopped[j]) for j in group])
    rewards = [[response.reward for response in group] for group in rollout.scored]
    rollout.rewards = rollout.logps.double().new_tensor(rewards)  # large ones may differ by little


def score_response(problem, text: str, stopped: bool = True) -> Response:
    """Tag a response and compute its reward. Other tasks' problems give it labels of their own."""
    found = {"error": None if stopped else NO_ANSWER}  # cut off, perhaps within the answer
    if isinstance(problem, Problem):
        tagged = tag(problem, text)
        found |= {"strategy": tagged.strategy, "matches": matches(problem, tagged)}
        found["guess"] = any(tagged.guessed)
        if error := tagged.error:
            found |= {"error_line": error.line, "line_error": error.kind, "due": error.due}
            found["error"] = error.kind
        if tagged.misguessed:
            found["error"] = GUESS
    else:
        found["strategy"] = problem.label(text) or NONE
    return Response(
        response=text,
        kind=problem.kind,
        difficulty=problem.difficulty,
        correct=problem.is_correct(text, stopped),
        stopped=stopped,
        reward=problem.reward(text, stopped),
        **found,
    )


def tag(problem: Problem, response: str) -> Tag:
    """Tag any text. A wrong guess that is carried through correctly is a guess, not an error."""
    lines = parse_lines(response)
    chunks = split_parts(lines)[: len(problem.parts)]
    chunks += [[]] * (len(problem.parts) - len(chunks))
    parts = tuple(strategy_of(chunk) for chunk in chunks)
    used = set(parts) - {NONE}
    strategy = MIXED
    if len(used) < 2:
        strategy = used.pop() if used else NONE
    guessed = tuple(bool(chunk) and chunk[0].guess for chunk in chunks)
    return Tag(strategy, parts, guessed, *first_error(problem, lines, chunks, parts))


def matches(problem: Problem, tag: Tag) -> bool:
    """Whether every part is solved with the strategy that needs no guess."""
    pairs = zip(tag.parts, problem.parts)
    return all(strategy == MATCHING_STRATEGY[part.kind] for strategy, part in pairs)


def split_parts(lines: list[Line]) -> list[list[Line]]:
    """Return the lines of each part: an opening after a closing starts a new one.

    The answer belongs to none.
    """
    chunks: list[list[Line]] = []
    before = None
    for line in lines:
        if line.form == "answer":
            break
        if before is None or (before.form == line.form == "anchor" and len(chunks[-1]) > 1):
            chunks.append([])
        chunks[-1].append(line)
        before = line
    return chunks


def strategy_of(chunk: list[Line]) -> str:
    """Return the direction that two thirds of a part's votes agree on; NONE without a step."""
    votes = Counter(line.direction for line in chunk if line.form == "step")
    if not votes:
        return NONE
    anchors = [line for line in chunk if line.form == "anchor"]
    if chunk[0].form == "anchor":
        votes[FORWARD if chunk[0].side == "start" else BACKWARD] += 1
        anchors = anchors[1:]
    if anchors:
        votes[FORWARD if anchors[-1].side == "end" else BACKWARD] += 1
    direction, most = votes.most_common(1)[0]
    return direction if 3 * most >= 2 * votes.total() else MIXED


# ------------------------------------------------------------------------------------------------
# Compare with a faultless solution in the same strategies, with the same guesses


def first_error(
    problem: Problem, lines: list[Line], chunks: list[list[Line]], parts: tuple[str, ...]
) -> tuple[bool, Error | None]:
    """Return whether a wrong guess comes before the first error, and that error."""
    directions, guesses = [], []
    for chunk, strategy, part in zip(chunks, parts, problem.parts):
        opening = chunk[0] if chunk and chunk[0].form == "anchor" else None
        if strategy in (MIXED, NONE):
            strategy = MATCHING_STRATEGY[part.kind]
            if opening:
                strategy = {"start": FORWARD, "end": BACKWARD}[opening.side]
        directions.append(strategy)
        guesses.append(problem.field.value(opening.value) if opening else None)

    due = parse_lines(problem.solution(directions, guesses))
    same = 0  # lines that are as they are due
    while same < min(len(lines), len(due)) and lines[same].text == due[same].text:
        same += 1
    misguessed = False
    if any(line.guess for line in due[:same]):
        right = parse_lines(problem.solution(directions))
        pairs = zip(due[:same], right)
        misguessed = any(line.guess and line.text != other.text for line, other in pairs)

    if same == max(len(lines), len(due)):
        return misguessed, None
    line = lines[same] if same < len(lines) else None
    expected = due[same] if same < len(due) else None
    kind = error_kind(line, expected, due[same + 1 :])
    return misguessed, Error(kind, same, expected.text if expected else "")


def error_kind(line: Line | None, expected: Line | None, later: list[Line]) -> str:
    """Return what is wrong with a line where `expected`, followed by the lines `later`, is due."""
    if line is None:
        return NO_ANSWER
    if line.form == "other":
        return FORMAT

    def is_turn_of(due: Line) -> bool:
        return (line.form, line.label, line.side) == (due.form, due.label, due.side)

    if expected is None or not is_turn_of(expected):
        return SKIPPED if any(is_turn_of(due) for due in later) else ORDER
    operands = (line.left, line.op, line.right)
    same_operands = operands == (expected.left, expected.op, expected.right)
    return ARITHMETIC if line.form == "step" and same_operands else OPERAND


# ------------------------------------------------------------------------------------------------
# See responses


def lines_of(response: str) -> list[str]:
    """Split a response as it is tagged; where no line is in the task's form, by line breaks."""
    lines = parse_lines(response)
    ours = any(line.form != "other" for line in lines)
    return [line.text for line in lines] if ours else response.splitlines()


def tagged_rows(path: Path, p: int) -> list[dict]:
    """Read a run's responses; or tag responses from elsewhere to our prompts, in GF(p)."""
    rows, content = [], path.read_bytes()
    of_run = path.name == RESPONSES and (path.parent / "metrics.jsonl").exists()
    if of_run:  # which may be writing its last line
        content = content.rpartition(b"\n")[0]
    for number, row in parse_json_lines(path, content):
        if not all(name in row and isinstance(row[name], kind) for name, kind in KINDS.items()):
            at, prompt, text = f"{path}, line {number}: ", row.get("prompt"), row.get("response")
            older = of_run and "strategy" in row
            require(not older, f"{at}another version of these scripts wrote this row")
            texts = isinstance(prompt, str) and isinstance(text, str)
            require(texts, f"{at}prompt or response is missing, or is no text")
            with user_errors(at):
                problem = parse_prompt(prompt, p)
            finished = row.get("finish_reason") != "length"  # as vLLM and others say it
            row |= {"answer": problem.answer} | asdict(score_response(problem, text, finished))
        rows.append(row)
    return rows


def main(config: ShowConfig) -> None:
    require(len(config.place) == 1, "name one run, or one file of JSON lines")
    path = Path(config.place[0])
    with user_errors():
        file = path / RESPONSES if path.is_dir() else path
        missing = path.is_dir() and not file.exists()
        require(not missing, f"{path} holds no {RESPONSES}: only GRPO runs keep them")
        rows = select(tagged_rows(file, config.field), config)
    require(bool(rows), f"{path} holds no such response")
    shown = map(json.dumps, rows) if config.json else show(rows, lines_of, config.n)
    print(*shown, sep="\n")


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(ShowConfig, __doc__, positional="place"))
