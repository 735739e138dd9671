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

An *inversion* problem gives the end and asks for the start. A *composition* is several such parts,
each (after the first) given `carry`, the result of the part before. Either strategy can be written
for either type; the one that does not match must begin with a guess of what is asked, and is right
one time in p.

The lines are the same for every tokenizer. Labels count up from a random number, so a model sees
every label in training, whatever the length of the chain. A hash of a problem's content (labels
left out) assigns it to the training or the validation split, so the two never overlap.

    python -m data.finite_field --difficulty hard --n 3        # problems with both solutions

After "Select and Improve" (arXiv 2606.13125), section 3; the wording of the texts is ours.
"""

import random
import re
import zlib
from dataclasses import dataclass, replace
from typing import Literal

from lib.flags import parse_flags, quiet_pipes, require_min, user_errors

DIFFICULTY = {"easy": (2, 5), "hard": (6, 9), "extreme": (6, 15)}  # steps of a part
MAX_LABEL = 40
MAX_FIELD = 9999  # elements are written with at most four digits
VALIDATION_SHARE = 8  # one problem in this many belongs to validation
FORWARD, BACKWARD = "forward", "backward"
WRITTEN = (FORWARD, BACKWARD)  # strategies of solutions; the longest sets the token limit
EVALUATION, INVERSION, COMPOSITION = "evaluation", "inversion", "composition"
MATCHING_STRATEGY = {EVALUATION: FORWARD, INVERSION: BACKWARD}
INVERSE = {"+": "-", "*": "/", "-": "+", "/": "*"}

# Only an answer at the very end counts, so that a list of answers earns nothing.
ANSWER = re.compile(r"(?:^|\s)answer\s+(e[0-9]+)\s*$")


def is_prime(p: int) -> bool:
    return p > 1 and all(p % d for d in range(2, int(p**0.5) + 1))


@dataclass(frozen=True)
class Field:
    """GF(p) for a prime p, its elements renamed: the value v is written `ek` with k = names[v]."""

    p: int
    names: tuple[int, ...]

    def name(self, value: int) -> str:
        return f"e{self.names[value]}"

    def value(self, name: str) -> int | None:
        """Return the value written as `name`; None if the field has no such element."""
        index = int(name[1:])
        return self.names.index(index) if index < self.p else None

    def apply(self, op: str, a: int, b: int) -> int | None:
        """Return `a op b` in GF(p), for op one of + - * /; None for a division by zero."""
        if op == "/":
            return None if b == 0 else a * pow(b, -1, self.p) % self.p
        return {"+": a + b, "-": a - b, "*": a * b}[op] % self.p


def make_field(p: int, rng: random.Random | None = None) -> Field:
    """Return GF(p) under a random renaming, or without rng under the one that all runs share.

    Raises ValueError if p is not prime or is too large.
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
    """One chain: `start`, then `steps` of (operation, operand), then `end`; all field values."""

    kind: str  # EVALUATION: start given, end asked; INVERSION: end given, start asked
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
    prefix: str = ""  # the beginning of the response, where that is given
    system = where = ""  # only problems of a file have these

    @property
    def kind(self) -> str:
        return self.parts[0].kind if len(self.parts) == 1 else COMPOSITION

    @property
    def steps(self) -> int:
        """Return the number of steps of all parts together."""
        return sum(len(part.steps) for part in self.parts)

    @property
    def difficulty(self) -> str:
        return f"{self.steps} step{'s' * (self.steps != 1)}"

    @property
    def answer(self) -> str:
        return self.field.name(self.parts[-1].asked)

    def labels(self, part: int) -> range:
        """Return the labels of the steps of part number `part`."""
        first = self.first_label + sum(len(p.steps) for p in self.parts[:part])
        return range(first, first + len(self.parts[part].steps))

    @property
    def explanation(self) -> str:
        """Return a sentence that explains the notation to a pretrained model."""
        p, order = self.field.p, "the order listed" if self.shown else "a secret order"
        text = f"The elements of GF({p}) are written e0 to e{p - 1} in {order}: carry the numbered "
        text += "steps out from start to end, or undo them from end to start, to find the element "
        return text + "marked by ?."

    def prompt(self) -> str:
        """Return the problem as text."""
        name, lines = self.field.name, []
        if self.shown:
            lines.append("elements " + " ".join(name(value) for value in range(self.field.p)))
        for i, part in enumerate(self.parts):
            given = name(part.given) if i == 0 else "carry"
            start, end = (given, "?") if part.kind == EVALUATION else ("?", given)
            lines.append(f"start {start}")
            for label, (op, b) in zip(self.labels(i), part.steps):
                lines.append(f"{label}: {op} {name(b)}")
            lines.append(f"end {end}")
        return "\n".join([*lines, "solution:\n"])

    def solution(self, strategies: str | list[str], guesses: list[int | None] | None = None) -> str:
        """Return a solution in the given strategy: one for all parts, or one for each.

        Where the strategy does not match the part's type, the solution opens with a guess: the
        value in `guesses`, or the right one where that is None.
        """
        n = len(self.parts)
        if isinstance(strategies, str):
            strategies = [strategies] * n
        lines, carried = [], self.parts[0].given
        plan = zip(self.parts, strategies, guesses or [None] * n, strict=True)
        for i, (part, strategy, guess) in enumerate(plan):
            if strategy == MATCHING_STRATEGY[part.kind]:
                part_lines, carried = self.part_solution(i, strategy, carried)
            else:
                carried = part.asked if guess is None else guess
                part_lines, _ = self.part_solution(i, strategy, carried)
                part_lines[0] = f"guess {part_lines[0]}"
            lines += part_lines
        return "\n".join([*lines, f"answer {self.field.name(carried)}"])

    def part_solution(self, i: int, strategy: str, value: int) -> tuple[list[str], int]:
        """Return the lines of part i, worked from `value` in one direction, and the result."""
        name = self.field.name
        steps, opens, closes = list(zip(self.labels(i), self.parts[i].steps)), "start", "end"
        if strategy == BACKWARD:
            steps = [(label, (INVERSE[op], b)) for label, (op, b) in reversed(steps)]
            opens, closes = closes, opens
        lines = [f"{opens} {name(value)}"]
        for label, (op, b) in steps:
            result = self.field.apply(op, value, b)
            lines.append(f"{label}: {name(value)} {op} {name(b)} = {name(result)}")
            value = result
        lines.append(f"{closes} {name(value)}")
        return lines, value

    def make_prefix(self, given: int, strategy: str = "") -> str:
        """Return the beginning of a solution: its first parts, and the next one's first words.

        given: how many parts, without a fault or a guess
        strategy: whose words open the next part, such as `start` or `guess end`; "" for none
        """
        lines, carried = [], self.parts[0].given
        for i, part in enumerate(self.parts[:given]):
            part_lines, carried = self.part_solution(i, MATCHING_STRATEGY[part.kind], carried)
            lines += part_lines
        if strategy:
            guess = strategy != MATCHING_STRATEGY[self.parts[given].kind]
            lines.append("guess " * guess + {FORWARD: "start", BACKWARD: "end"}[strategy])
        return "\n".join(lines)

    def opening_strategy(self, response: str, given: int) -> str:
        """Return the strategy that opens the part behind the `given` ones, "" for neither."""
        words = response.split()
        for strategy in WRITTEN:
            prefix = self.make_prefix(given, strategy).split()
            if words[: len(prefix)] == prefix:
                return strategy
        return ""

    def is_correct(self, response: str, stopped: bool = True) -> bool:
        """Whether the response ends in the right answer, by exact match: what tables call accuracy.

        One that the token limit cut off (not `stopped`) is never right: `answer e1` may become e10.
        """
        match = ANSWER.search(response)
        return stopped and match is not None and match[1] == self.answer

    def reward(self, response: str, stopped: bool = True) -> float:
        """Return the reward that GRPO trains on, any float: here 1 for the right answer, else 0."""
        return float(self.is_correct(response, stopped))


@dataclass(frozen=True)
class Task:
    """Which problems to draw. Raises ValueError if there are none."""

    steps: tuple[int, int] = DIFFICULTY["easy"]  # fewest and most steps of a part
    p: int = 11
    relabel: str = "fixed"  # fixed: one hidden renaming; shown: a new one in each prompt
    evaluation_share: float = 0.5  # share of evaluation among the parts
    parts: tuple[int, int] = (1, 1)  # fewest and most parts; two or more make a composition
    window: int = 0  # parts that are left to solve, the last ones; 0: all

    def __post_init__(self):
        make_field(self.p)
        for what, (low, high) in (("steps", self.steps), ("parts", self.parts)):
            if not 1 <= low <= high:
                raise ValueError(f"{what} must be a range such as 2-5, from 1; {low}-{high} is not")
        steps, parts, share = self.steps[1], self.parts[1], self.evaluation_share
        if steps * parts > MAX_LABEL:
            raise ValueError(f"{parts} parts of {steps} steps need more than {MAX_LABEL} labels")
        if not 0 <= share <= 1:
            raise ValueError(f"the evaluation share must lie between 0 and 1; {share} does not")
        if self.window < 0:
            raise ValueError("the window must be 0, for all parts, or more")
        if self.relabel not in ("fixed", "shown"):
            raise ValueError(f"relabel must be fixed or shown, not {self.relabel!r}")

    def examples(self, rng: random.Random) -> tuple[list[Problem], list[str]]:
        """Return 64 of the longest problems and 200 others, and the longest ones' solutions."""
        task = replace(self, steps=(self.steps[1],) * 2, parts=(self.parts[1],) * 2)
        longest = [task.sample(rng, "train") for _ in range(64)]
        others = [self.sample(rng, "train") for _ in range(200)]
        solutions = [self.solution(p, way, rng) for p in longest for way in WRITTEN]
        return longest + others, solutions

    @staticmethod
    def from_flags(config, p: int | None = None, relabel: str = "") -> "Task":
        """Return the task that a script's flags describe; `p` and `relabel` are a checkpoint's."""
        steps = parse_range(config.steps) if config.steps else DIFFICULTY[config.difficulty]
        share, parts = getattr(config, "evaluation_share", 0.5), parse_range(config.parts)
        window = getattr(config, "window", 0)
        return Task(steps, p or config.field, relabel or config.relabel, share, parts, window)

    @property
    def words(self) -> list[str]:
        return vocabulary(self.p)

    @property
    def about(self) -> str:
        low, high = self.steps
        return f"problems of {low}-{high} steps in GF({self.p})"

    def sample(self, rng: random.Random, split: str, index: int | None = None) -> Problem:
        """Draw a problem of the split "train" or "validation". Raises ValueError if it is empty."""
        for _ in range(1000):
            field = make_field(self.p, rng if self.relabel == "shown" else None)
            parts: list[Part] = []
            for _ in range(rng.randint(*self.parts)):
                kind = EVALUATION if rng.random() < self.evaluation_share else INVERSION
                known = parts[-1].asked if parts else rng.randrange(self.p)
                steps = draw_steps(field, rng, rng.randint(*self.steps))
                parts.append(make_part(field, kind, steps, known))
            labels = sum(len(part.steps) for part in parts)
            first_label = rng.randint(1, MAX_LABEL - labels + 1)
            problem = Problem(field, tuple(parts), first_label, self.relabel == "shown")
            if is_validation(problem) == (split == "validation"):
                return replace(problem, prefix=problem.make_prefix(self.solved(problem)))
        raise ValueError(f"this task has no {split} problems, or hardly any")

    def validation(self, n: int, rng: random.Random) -> list[Problem]:
        """Return n distinct validation problems; of a task that has fewer, all or nearly all."""
        distinct, repeated = {}, 0
        while len(distinct) < n and repeated < 300:  # in a row
            problem = self.sample(rng, "validation")
            known = distinct.setdefault((problem.field, problem.parts), problem)
            repeated = 0 if known is problem else repeated + 1
        return list(distinct.values())

    def solution(self, problem: Problem, strategy: str, rng: random.Random) -> str:
        """Return a worked solution, or the rest of one, behind the problem's prefix.

        For "mixed" each part takes either strategy with even odds.
        """
        n, mixed = len(problem.parts), strategy == "mixed"
        ways = [rng.choice(WRITTEN) if mixed else strategy for _ in range(n)]
        solved = self.solved(problem)
        ways[:solved] = [MATCHING_STRATEGY[part.kind] for part in problem.parts[:solved]]
        return problem.solution(ways).removeprefix(problem.prefix)

    def solved(self, problem: Problem) -> int:
        """Return how many parts stand solved in the prompt, before the window."""
        return max(0, len(problem.parts) - self.window) if self.window else 0


def make_part(field: Field, kind: str, steps: list[tuple[str, int]], known: int) -> Part:
    """Return a part with these steps whose given side is `known`."""
    value = known
    undone = [(INVERSE[op], b) for op, b in reversed(steps)]
    for op, b in steps if kind == EVALUATION else undone:
        value = field.apply(op, value, b)
    start, end = (known, value) if kind == EVALUATION else (value, known)
    return Part(kind, start, tuple(steps), end)


def draw_steps(field: Field, rng: random.Random, n: int) -> list[tuple[str, int]]:
    """Draw n steps. Factors are never zero, so every step can be undone."""
    steps = []
    for _ in range(n):
        op = rng.choice("+*")
        steps.append((op, rng.randrange(field.p) if op == "+" else rng.randrange(1, field.p)))
    return steps


def is_validation(problem: Problem) -> bool:
    """Whether the problem belongs to the validation split; its labels do not matter."""
    content = (problem.field, [(part.kind, part.given, part.steps) for part in problem.parts])
    return zlib.crc32(repr(content).encode()) % VALIDATION_SHARE == 0


def vocabulary(p: int) -> list[str]:
    """Return every word that prompts and solutions of GF(p) are made of."""
    words = ["start", "end", "?", "solution:", "guess", "answer", "carry", "elements"]
    words += ["+", "-", "*", "/", "="]
    labels = [f"{label}:" for label in range(1, MAX_LABEL + 1)]
    return words + [f"e{i}" for i in range(p)] + labels


def parse_range(text: str) -> tuple[int, int]:
    """Parse "3-7" to (3, 7) and "4" to (4, 4). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text, re.ASCII)
    if not match:
        raise ValueError(f"expected a range such as 2-5, not {text!r}")
    return int(match[1]), int(match[2] or match[1])


# ------------------------------------------------------------------------------------------------


@dataclass
class PrintConfig:
    difficulty: Literal["easy", "hard", "extreme"] = "easy"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # such as 2-3: compositions of so many parts
    field: int = 11  # number of elements, a prime
    relabel: Literal["fixed", "shown"] = "fixed"  # one hidden naming of the elements, or shown ones
    n: int = 3  # number of problems
    seed: int = 0  # of the problems


def main(config: PrintConfig) -> None:
    require_min(config, n=1)
    rng = random.Random(config.seed)
    with user_errors():
        task = Task.from_flags(config)
        problems = [task.sample(rng, "train") for _ in range(config.n)]
    for i, problem in enumerate(problems, 1):
        print(f"--- {i}: {problem.kind}, {problem.steps} steps, answer {problem.answer}")
        print(problem.prompt())
        for strategy in WRITTEN:
            print(f"[{strategy}]\n{problem.solution(strategy)}\n")


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(PrintConfig, "Print problems with both solutions."))
