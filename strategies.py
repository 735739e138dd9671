"""The tagger: which strategy a response follows, and where it first goes wrong.

It reads text alone, so it works on any model's responses. A response is a row of *lines*, recognised by their form
and not by line breaks:

    start e3, end e1, guess end e1     an opening or a closing
    8: e3 + e4 = e0                    a step
    answer e1
    anything between                   a line of another form

Every line votes for a direction (an opening by its side, a step by its operation, a closing by its side); the
lines are then held against what the problem demands in that direction.
"""

import re
from collections import Counter
from dataclasses import dataclass

from data.finite_field import BACKWARD, FITTING, FORWARD, Problem, reward

MIXED, NONE = "mixed", "none"
STRATEGIES = (FORWARD, BACKWARD, MIXED, NONE)  # what a response can be tagged as

# What can be wrong with a line.
ARITHMETIC = "arithmetic"  # the result is not operation(value, operand)
OPERAND = "wrong operand"  # a value, operation or operand that is not the one at this point
SKIPPED = "skipped step"  # a line that is due is left out, and a later one said
ORDER = "wrong order"  # a line out of turn: said before, or never due
FORMAT = "format"  # a line of another form
NO_ANSWER = "no answer"  # the response ends before its answer

GUESS = "wrong guess"  # no fault of a line: the strategy does not fit, and what it had to guess is not so

LINE = re.compile(  # of whole words
    r"(?<![^ ])(?:"
    r"(?P<guess>guess )?(?P<side>start|end) (?P<value>e\d{1,4})"
    r"|(?P<label>\d{1,4}): (?P<left>e\d{1,4}) (?P<op>[-+*/]) (?P<right>e\d{1,4}) = (?P<result>e\d{1,4})"
    r"|answer (?P<answer>e\d{1,4})"
    r")(?![^ ])",
    re.ASCII,
)


@dataclass(frozen=True)
class Line:
    form: str  # "anchor" (an opening or closing), "step", "answer" or "other"
    text: str
    guess: bool = False
    side: str = ""
    value: str = ""  # of an anchor, a step's result, or the answer
    label: int = 0
    left: str = ""
    op: str = ""
    right: str = ""

    @property
    def direction(self) -> str | None:
        """The direction in which a step goes."""
        return {"+": FORWARD, "*": FORWARD, "-": BACKWARD, "/": BACKWARD}.get(self.op)


@dataclass(frozen=True)
class Error:
    kind: str
    line: int  # which line of the response, from 0
    label: int | None  # the label of the step that was due there, None where no step was


@dataclass(frozen=True)
class Tag:
    strategy: str  # FORWARD, BACKWARD, MIXED (parts differ, or one part goes both ways) or NONE (no step at all)
    parts: tuple[str, ...]  # the same for each part of the problem
    guessed: tuple[bool, ...]  # which parts open with a guess
    misguessed: bool  # whether a wrong guess comes before the first error
    steps_right: int  # steps done before the first error
    error: Error | None
    answer: str | None


def tag(problem: Problem, response: str) -> Tag:
    """Tag any text. A wrong guess, carried through rightly, is no error: it is a guess."""
    lines = read(response)
    chunks = split(lines)[: len(problem.parts)]
    chunks += [[]] * (len(problem.parts) - len(chunks))
    parts = tuple(strategy_of(chunk) for chunk in chunks)
    used = set(parts) - {NONE}
    answers = [line.value for line in lines if line.form == "answer"]
    misguessed, steps_right, error = check(problem, lines, chunks, parts)
    return Tag(
        strategy=NONE if not used else used.pop() if len(used) == 1 else MIXED,
        parts=parts,
        guessed=tuple(bool(chunk) and chunk[0].guess for chunk in chunks),
        misguessed=misguessed,
        steps_right=steps_right,
        error=error,
        answer=answers[-1] if answers else None,
    )


def fits(problem: Problem, tag: Tag) -> bool:
    """Whether every part is solved with the strategy that needs no guess."""
    return all(strategy == FITTING[part.kind] for strategy, part in zip(tag.parts, problem.parts))


@dataclass(frozen=True)
class Response:
    """What is kept of a response."""

    kind: str  # the problem's type
    steps: int
    strategy: str
    fits: bool
    correct: bool
    error: str | None  # what went wrong first: a wrong guess, or the kind of a line
    stopped: bool


def judge(problem: Problem, response: str, stopped: bool) -> Response:
    found = tag(problem, response)
    correct = bool(reward(problem, response))
    error = GUESS if found.misguessed else found.error.kind if found.error else None
    return Response(problem.kind, problem.steps, found.strategy, fits(problem, found), correct, error, stopped)


def read(response: str) -> list[Line]:
    """The lines of a response, in order; what lies between two recognised ones is one line of form "other"."""
    text, lines, end = " ".join(response.split()), [], 0
    for found in LINE.finditer(text):
        if between := text[end : found.start()].strip():
            lines.append(Line("other", between))
        end = found.end()
        if found["side"]:
            lines.append(Line("anchor", found[0], bool(found["guess"]), found["side"], found["value"]))
        elif found["answer"]:
            lines.append(Line("answer", found[0], value=found["answer"]))
        else:
            step = {"label": int(found["label"]), "left": found["left"], "op": found["op"], "right": found["right"]}
            lines.append(Line("step", found[0], value=found["result"], **step))
    if rest := text[end:].strip():
        lines.append(Line("other", rest))
    return lines


def split(lines: list[Line]) -> list[list[Line]]:
    """The lines of each part: an opening that follows a closing starts a new one. The answer belongs to none."""
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
    """Two thirds of a part's votes decide; NONE without a step."""
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


# ------------------------------------------------------------------------------------------------------------------
# Checking: the lines against those of a faultless solution in the same strategies, with the same guesses


def check(
    problem: Problem, lines: list[Line], chunks: list[list[Line]], parts: tuple[str, ...]
) -> tuple[bool, int, Error | None]:
    """Whether a wrong guess comes before the first error, the number of steps before it, and the error."""
    directions, guesses = [], []
    for chunk, strategy, part in zip(chunks, parts, problem.parts):
        opening = chunk[0] if chunk and chunk[0].form == "anchor" else None
        if strategy in (MIXED, NONE):
            strategy = {"start": FORWARD, "end": BACKWARD}[opening.side] if opening else FITTING[part.kind]
        directions.append(strategy)
        guesses.append(problem.field.value(opening.value) if opening else None)

    due = read(problem.solution(directions, guesses))
    texts = [line.text for line in lines]
    same = next((i for i, line in enumerate(due) if texts[i : i + 1] != [line.text]), len(due))  # lines as they are due
    steps_right = sum(line.form == "step" for line in due[:same])
    misguessed = False
    if any(line.guess for line in due[:same]):
        right = read(problem.solution(directions))
        misguessed = any(line.guess and line.text != other.text for line, other in zip(due[:same], right))

    if same == max(len(lines), len(due)):
        return misguessed, steps_right, None
    line, expected = (found[same] if same < len(found) else None for found in (lines, due))
    kind = _kind(line, expected, due[same + 1 :])
    return misguessed, steps_right, Error(kind, same, (expected and expected.label) or None)


def _kind(line: Line | None, expected: Line | None, later: list[Line]) -> str:
    """What is wrong with a line where another, followed by the lines `later`, is expected."""
    if line is None:
        return NO_ANSWER
    if line.form == "other":
        return FORMAT

    def is_turn_of(due: Line) -> bool:
        return (line.form, line.label, line.side) == (due.form, due.label, due.side)

    if expected is None or not is_turn_of(expected):
        return SKIPPED if any(is_turn_of(due) for due in later) else ORDER
    same_operands = (line.left, line.op, line.right) == (expected.left, expected.op, expected.right)
    return ARITHMETIC if line.form == "step" and same_operands else OPERAND
