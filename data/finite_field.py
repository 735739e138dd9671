"""The task: arithmetic chains in GF(p) whose elements carry meaningless names.

    start e9                the start is known ...        (an evaluation problem)
    29: * e3                a step: its label, operation and operand
    30: + e4
    end ?                   ... and the end is asked
    solution:

    start e9                guess end e0                  its forward and its backward solution
    29: e9 * e3 = e3        30: e0 - e4 = e3
    30: e3 + e4 = e0        29: e3 / e3 = e9
    end e0                  start e9
    answer e0               answer e0

An *inversion* problem gives the end and asks for the start. A *composition* is several such parts, each
(after the first) given `carry`, the result of the part before. Either strategy can solve either type; the one that
does not fit begins with a guess of what is asked, and is right one time in p.

The lines are the same for every tokenizer. Labels count up from a random number, so that a model meets every
label during training whatever the length of the chain. A problem belongs to the training or to the validation
stream by a hash of its content (labels left out), so the two never overlap.

    python -m data.finite_field --difficulty hard --n 3        # problems with both solutions

After "Select and Improve" (arXiv 2606.13125), section 3; the wording of prompts and solutions is ours.
"""

import argparse
import random
import re
import sys
import zlib
from dataclasses import dataclass, replace
from typing import NoReturn

DIFFICULTY = {"easy": (2, 5), "hard": (6, 9), "extreme": (6, 15)}  # steps of a part
MAX_LABEL = 40
MAX_FIELD = 9999  # elements are written with at most four digits
VALIDATION_SHARE = 8  # one problem in this many belongs to validation
FORWARD, BACKWARD = "forward", "backward"
EVALUATION, INVERSION, COMPOSITION = "evaluation", "inversion", "composition"
FITTING = {EVALUATION: FORWARD, INVERSION: BACKWARD}
INVERSE = {"+": "-", "*": "/", "-": "+", "/": "*"}

# The answer counts only as the last thing said, so that a list of answers earns nothing.
ANSWER = re.compile(r"(?:^|\s)answer\s+(e[0-9]+)\s*$")


def is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


@dataclass(frozen=True)
class Field:
    """GF(p) for a prime p, its elements renamed: `names[v]` is k where the value v is written `ek`."""

    p: int
    names: tuple[int, ...]

    def name(self, value: int) -> str:
        return f"e{self.names[value]}"

    def value(self, name: str) -> int | None:
        """The value written as `name`, or None where the field has no such element."""
        index = int(name[1:])
        return self.names.index(index) if index < self.p else None

    def apply(self, op: str, a: int, b: int) -> int | None:
        """`a op b` in GF(p), for op one of + - * /; None for a division by zero."""
        if op == "/":
            return None if b == 0 else a * pow(b, -1, self.p) % self.p
        return {"+": a + b, "-": a - b, "*": a * b}[op] % self.p


def make_field(p: int, rng: random.Random | None = None) -> Field:
    """GF(p) under a random renaming, or, without rng, under the hidden one that all runs share.

    Raises ValueError when p is not prime, or too large.
    """
    if p > MAX_FIELD:
        raise ValueError(f"the field may have at most {MAX_FIELD} elements, not {p}")
    if not is_prime(p):
        raise ValueError(f"the field must have a prime number of elements; {p} is not prime")
    names = list(range(p))
    (rng or random.Random(f"hidden names of GF({p})")).shuffle(names)
    return Field(p, tuple(names))


@dataclass(frozen=True)
class Part:
    """One chain: `start`, then `steps` of (operation, operand), then `end`; all as values of the field."""

    kind: str  # EVALUATION: the start is given, the end asked; INVERSION: the other way round
    start: int
    steps: tuple[tuple[str, int], ...]
    end: int

    @property
    def given(self) -> int:
        return self.start if self.kind == EVALUATION else self.end

    @property
    def asked(self) -> int:
        return self.end if self.kind == EVALUATION else self.start


@dataclass(frozen=True)
class Problem:
    field: Field
    parts: tuple[Part, ...]
    first_label: int
    shown: bool = False  # whether the prompt lists the names of the elements

    @property
    def kind(self) -> str:
        return self.parts[0].kind if len(self.parts) == 1 else COMPOSITION

    @property
    def steps(self) -> int:
        """Number of steps, all parts together."""
        return sum(len(part.steps) for part in self.parts)

    @property
    def answer(self) -> str:
        return self.field.name(self.parts[-1].asked)

    def labels(self, part: int) -> range:
        """The labels of the steps of part number `part`."""
        first = self.first_label + sum(len(p.steps) for p in self.parts[:part])
        return range(first, first + len(self.parts[part].steps))

    @property
    def explanation(self) -> str:
        """A sentence for models that have read other texts than these."""
        p, order = self.field.p, "the order listed" if self.shown else "a secret order"
        return (
            f"The elements of GF({p}) are written e0 to e{p - 1} in {order}: carry the numbered steps out from start "
            "to end, or undo them from end to start, to find the element marked by ?."
        )

    def prompt(self) -> str:
        name = self.field.name
        lines = ["elements " + " ".join(name(v) for v in range(self.field.p))] if self.shown else []
        for i, part in enumerate(self.parts):
            given = name(part.given) if i == 0 else "carry"
            start, end = (given, "?") if part.kind == EVALUATION else ("?", given)
            lines.append(f"start {start}")
            lines += [f"{label}: {op} {name(b)}" for label, (op, b) in zip(self.labels(i), part.steps)]
            lines.append(f"end {end}")
        return "\n".join([*lines, "solution:\n"])

    def solution(self, strategies: str | list[str], guesses: list[int | None] | None = None) -> str:
        """A solution in the given strategy (one for all parts, or one for each).

        Where the strategy does not fit the part's type, the solution opens with a guess: the value in `guesses`, or
        the right one where that is None.
        """
        if isinstance(strategies, str):
            strategies = [strategies] * len(self.parts)
        field, lines, carried = self.field, [], self.parts[0].given
        for i, (part, strategy, guess) in enumerate(
            zip(self.parts, strategies, guesses or [None] * len(self.parts), strict=True)
        ):
            steps, opens, closes = list(zip(self.labels(i), part.steps)), "start", "end"
            if strategy == BACKWARD:
                steps = [(label, (INVERSE[op], b)) for label, (op, b) in reversed(steps)]
                opens, closes = closes, opens
            fitting = strategy == FITTING[part.kind]
            opening = carried if fitting else part.asked if guess is None else guess
            value = opening
            lines.append(f"{'' if fitting else 'guess '}{opens} {field.name(value)}")
            for label, (op, b) in steps:
                result = field.apply(op, value, b)
                lines.append(f"{label}: {field.name(value)} {op} {field.name(b)} = {field.name(result)}")
                value = result
            lines.append(f"{closes} {field.name(value)}")
            carried = value if fitting else opening
        return "\n".join([*lines, f"answer {field.name(carried)}"])


def reward(problem: Problem, response: str) -> float:
    """1.0 when the response ends in the right answer, else 0.0: the outcome reward."""
    found = ANSWER.search(response)
    return float(found is not None and found[1] == problem.answer)


@dataclass(frozen=True)
class Task:
    """Which problems to draw. Raises ValueError for what cannot be drawn."""

    steps: tuple[int, int] = DIFFICULTY["easy"]  # fewest and most steps of a part
    p: int = 11
    relabel: str = "fixed"  # fixed: one hidden renaming; shown: a new one for each problem, in its prompt
    evaluation_share: float = 0.5  # share of evaluation among the parts
    parts: tuple[int, int] = (1, 1)  # fewest and most parts; two or more make a composition

    def __post_init__(self):
        make_field(self.p)
        for what, (low, high) in (("steps", self.steps), ("parts", self.parts)):
            if not 1 <= low <= high:
                raise ValueError(f"{what} must be a range such as 2-5, from 1 upwards; {low}-{high} is not")
        if self.steps[1] * self.parts[1] > MAX_LABEL:
            raise ValueError(f"{self.parts[1]} parts of {self.steps[1]} steps need more than {MAX_LABEL} labels")
        if not 0 <= self.evaluation_share <= 1:
            raise ValueError(f"the evaluation share must lie between 0 and 1; {self.evaluation_share} does not")
        if self.relabel not in ("fixed", "shown"):
            raise ValueError(f"relabel must be fixed or shown, not {self.relabel!r}")

    def longest(self) -> "Task":
        """This task with its longest problems only."""
        return replace(self, steps=(self.steps[1],) * 2, parts=(self.parts[1],) * 2)

    @staticmethod
    def from_flags(
        difficulty: str, steps: str, p: int, relabel: str, parts: str, evaluation_share: float = 0.5
    ) -> "Task":
        """The task that flags describe: ranges as text, `steps` instead of `difficulty` where it is not empty."""
        return Task(
            parse_range(steps) if steps else DIFFICULTY[difficulty], p, relabel, evaluation_share, parse_range(parts)
        )

    def sample(self, rng: random.Random, split: str) -> Problem:
        """Draw a problem from the stream `split`, "train" or "validation". Raises ValueError where that is empty."""
        for _ in range(1000):
            field = make_field(self.p, rng if self.relabel == "shown" else None)
            parts: list[Part] = []
            for _ in range(rng.randint(*self.parts)):
                kind = EVALUATION if rng.random() < self.evaluation_share else INVERSION
                known = parts[-1].asked if parts else rng.randrange(self.p)
                parts.append(_make_part(field, rng, kind, rng.randint(*self.steps), known))
            labels = sum(len(part.steps) for part in parts)
            problem = Problem(field, tuple(parts), rng.randint(1, MAX_LABEL - labels + 1), self.relabel == "shown")
            if is_validation(problem) == (split == "validation"):
                return problem
        raise ValueError(f"this task has no {split} problems, or hardly any")


def _make_part(field: Field, rng: random.Random, kind: str, n: int, known: int) -> Part:
    """A part of n steps whose given side is `known`. Factors are never zero: every step can be undone."""
    steps = []
    for _ in range(n):
        op = rng.choice("+*")
        steps.append((op, rng.randrange(field.p) if op == "+" else rng.randrange(1, field.p)))
    value = known
    for op, b in steps if kind == EVALUATION else [(INVERSE[op], b) for op, b in reversed(steps)]:
        value = field.apply(op, value, b)
    start, end = (known, value) if kind == EVALUATION else (value, known)
    return Part(kind, start, tuple(steps), end)


def is_validation(problem: Problem) -> bool:
    """Whether the problem belongs to the validation stream; its labels do not matter."""
    content = (problem.field, [(part.kind, part.given, part.steps) for part in problem.parts])
    return zlib.crc32(repr(content).encode()) % VALIDATION_SHARE == 0


def choose_strategies(problem: Problem, strategy: str, rng: random.Random) -> list[str]:
    """A strategy for each part: the named one, or for "mixed" either with even odds."""
    return [rng.choice((FORWARD, BACKWARD)) if strategy == "mixed" else strategy for _ in problem.parts]


def vocabulary(p: int) -> list[str]:
    """Every word that prompts and solutions of GF(p) are made of."""
    words = ["start", "end", "?", "solution:", "guess", "answer", "carry", "elements", "+", "-", "*", "/", "="]
    return words + [f"e{i}" for i in range(p)] + [f"{label}:" for label in range(1, MAX_LABEL + 1)]


def parse_range(text: str) -> tuple[int, int]:
    """`"3-7"` -> (3, 7), `"4"` -> (4, 4). Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    if not found:
        raise ValueError(f"expected a range such as 2-5, not {text!r}")
    return int(found[1]), int(found[2] or found[1])


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main() -> None:
    parser = Parser(description="Print problems with both solutions.")
    parser.add_argument("--difficulty", choices=DIFFICULTY, default="easy", help="steps of a part: %(choices)s")
    parser.add_argument("--steps", default="", help="such as 3-7, instead of --difficulty")
    parser.add_argument("--parts", default="1", help="such as 2-3: compositions of so many parts")
    parser.add_argument("--field", type=int, default=11, help="number of elements, a prime")
    parser.add_argument("--relabel", choices=("fixed", "shown"), default="fixed", help="naming of the elements")
    parser.add_argument("--n", type=int, default=3, help="number of problems")
    parser.add_argument("--seed", type=int, default=0)
    try:
        args = parser.parse_args()
        task = Task.from_flags(args.difficulty, args.steps, args.field, args.relabel, args.parts)
        if args.n < 1:
            raise ValueError("--n must be at least 1")
    except ValueError as error:
        print(f"finite_field.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    rng = random.Random(args.seed)
    for i in range(args.n):
        problem = task.sample(rng, "train")
        print(f"--- {i + 1}: {problem.kind}, {problem.steps} steps, answer {problem.answer}\n{problem.prompt()}")
        for strategy in (FORWARD, BACKWARD):
            print(f"[{strategy}]\n{problem.solution(strategy)}\n")


if __name__ == "__main__":
    main()
