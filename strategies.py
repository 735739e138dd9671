"""The tagger: which strategy a response follows, and where it first goes wrong; and its reward.

It reads text alone, so it works on any model's responses. A response is a sequence of *lines*,
recognised by their form and not by line breaks:

    start e3, end e1, guess end e1     an opening or a closing
    8: e3 + e4 = e0                    a step
    answer e1
    anything between                   a line of another form

Every line votes for a direction: an opening or closing by its side, a step by its operation. The
lines are then compared with a faultless solution in that direction.
"""

import re
from collections import Counter
from dataclasses import dataclass

from data.finite_field import BACKWARD, FORWARD, MATCHING_STRATEGY, Problem, is_correct, reward

MIXED, NONE = "mixed", "none"
STRATEGIES = (FORWARD, BACKWARD, MIXED, NONE)  # what a response can be tagged as

# What can be wrong with a line.
ARITHMETIC = "arithmetic"  # the result is not operation(value, operand)
OPERAND = "wrong operand"  # a value, operation or operand that is not the one at this point
SKIPPED = "skipped step"  # an expected line is missing; a later one appears instead
ORDER = "wrong order"  # a line out of turn: it came before, or is never due
FORMAT = "format"  # a line of another form
NO_ANSWER = "no answer"  # the response ends before its answer does

# No fault of a line: the strategy did not match the problem type, and its guess was wrong.
GUESS = "wrong guess"

LINE = re.compile(  # of whole words
    r"(?<![^ ])(?:"
    r"(?P<guess>guess )?(?P<side>start|end) (?P<value>e\d{1,4})"
    r"|(?P<label>\d{1,4}): (?P<left>e\d{1,4}) (?P<op>[-+*/]) (?P<right>e\d{1,4})"
    r" = (?P<result>e\d{1,4})"
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
        """Return the direction in which a step goes."""
        return {"+": FORWARD, "*": FORWARD, "-": BACKWARD, "/": BACKWARD}.get(self.op)


@dataclass(frozen=True)
class Error:
    kind: str
    line: int  # which line of the response, from 0
    label: int | None  # the label of the step that was due there, None where no step was


@dataclass(frozen=True)
class Tag:
    strategy: str  # FORWARD, BACKWARD, MIXED (parts differ, or one is both) or NONE (no step)
    parts: tuple[str, ...]  # the same for each part of the problem
    guessed: tuple[bool, ...]  # which parts open with a guess
    misguessed: bool  # whether a wrong guess comes before the first error
    steps_right: int  # steps before the first error
    error: Error | None
    answer: str | None


@dataclass(frozen=True)
class Response:
    """What is kept of a scored response."""

    kind: str  # the problem's type
    steps: int
    strategy: str
    matches: bool  # whether every part is solved with the strategy that needs no guess
    correct: bool  # ended by a stop token and exact match of the answer: what tables count
    error: str | None  # what went wrong first: a wrong guess, or the kind of a line's error
    stopped: bool  # whether it ended before the token limit
    reward: float = 0.0  # what GRPO trains on


def score_rollout(rollout, problems: list[Problem], tokenizer) -> None:
    """Score a rollout's responses: set rollout.scored, P lists of G, and rollout.rewards (P, G)."""
    texts = tokenizer.decode(rollout.response_tokens())
    stopped = rollout.stopped.tolist()
    G = len(texts) // len(problems)
    rollout.scored = []
    for i, problem in enumerate(problems):
        group = range(i * G, (i + 1) * G)
        rollout.scored.append([score_response(problem, texts[j], stopped[j]) for j in group])
    rewards = [[response.reward for response in group] for group in rollout.scored]
    rollout.rewards = rollout.logps.new_tensor(rewards)


def score_response(problem: Problem, text: str, stopped: bool) -> Response:
    """Tag a response and compute its reward."""
    tagged = tag(problem, text)
    cut_off = None if stopped else NO_ANSWER  # perhaps within the answer
    error = tagged.error.kind if tagged.error else cut_off
    return Response(
        kind=problem.kind,
        steps=problem.steps,
        strategy=tagged.strategy,
        matches=matches(problem, tagged),
        correct=is_correct(problem, text, stopped),
        reward=reward(problem, text, stopped),
        error=GUESS if tagged.misguessed else error,
        stopped=stopped,
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
    answers = [line.value for line in lines if line.form == "answer"]
    misguessed, steps_right, error = first_error(problem, lines, chunks, parts)
    return Tag(
        strategy=strategy,
        parts=parts,
        guessed=tuple(bool(chunk) and chunk[0].guess for chunk in chunks),
        misguessed=misguessed,
        steps_right=steps_right,
        error=error,
        answer=answers[-1] if answers else None,
    )


def matches(problem: Problem, tag: Tag) -> bool:
    """Whether every part is solved with the strategy that needs no guess."""
    pairs = zip(tag.parts, problem.parts)
    return all(strategy == MATCHING_STRATEGY[part.kind] for strategy, part in pairs)


def parse_lines(response: str) -> list[Line]:
    """Return the lines in order; text between two recognised ones is one line of form "other"."""
    text, lines, end = " ".join(response.split()), [], 0
    for match in LINE.finditer(text):
        if between := text[end : match.start()].strip():
            lines.append(Line("other", between))
        end = match.end()
        if match["side"]:
            guess = bool(match["guess"])
            lines.append(Line("anchor", match[0], guess, match["side"], match["value"]))
        elif match["answer"]:
            lines.append(Line("answer", match[0], value=match["answer"]))
        else:
            step = {key: match[key] for key in ("left", "op", "right")}
            step |= {"label": int(match["label"]), "value": match["result"]}
            lines.append(Line("step", match[0], **step))
    if rest := text[end:].strip():
        lines.append(Line("other", rest))
    return lines


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
) -> tuple[bool, int, Error | None]:
    """Return whether a wrong guess comes before the first error, the right steps, and the error."""
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
    steps_right = sum(line.form == "step" for line in due[:same])
    misguessed = False
    if any(line.guess for line in due[:same]):
        right = parse_lines(problem.solution(directions))
        pairs = zip(due[:same], right)
        misguessed = any(line.guess and line.text != other.text for line, other in pairs)

    if same == max(len(lines), len(due)):
        return misguessed, steps_right, None
    line = lines[same] if same < len(lines) else None
    expected = due[same] if same < len(due) else None
    kind = error_kind(line, expected, due[same + 1 :])
    label = expected.label if expected else 0
    return misguessed, steps_right, Error(kind, same, label or None)


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
