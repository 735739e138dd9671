r"""Any task, from a file with a JSON object in each line: {"prompt": ..., "answer": ...}.

    python train_grpo.py --init models/smollm2 --data sums.jsonl --answer-pattern '(-?\d+)\D*$'

"response" is a worked solution, for SFT; where "answer" is missing, its answer counts. Optional:
"system" (a system prompt), "kind" and "difficulty" (tables group by them) and "split" ("train" or
"validation"; otherwise one prompt in eight, by its hash, is for validation).

A response is right if it has ended and its answer equals the problem's: as text, as a number, or,
where the problem's is LaTeX, by math-verify. It lies where --answer-pattern matches last, in its
first group if it has one; without the flag the whole response is the answer.
"""

import functools
import math
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

from data.finite_field import VALIDATION_SHARE
from lib.flags import fail, parse_json_lines, require
from lib.responses import composed, printable

INTEGER = r"(?:\d{1,3}(?:,\d{3}){1,99}|\d{1,300})"
NUMBER = re.compile(
    rf"([-+]?(?:{INTEGER}(?:\.\d{{0,300}})?|\.\d{{1,300}}))(?:/({INTEGER}))?", re.ASCII
)
LATEX = re.compile(r"[\\$^{}]")
TAKEN = ("all", "accuracy", "verified", "match", "match_rate", "validation")  # tables' own labels
TEXTS = ("prompt", "answer", "response", "system", "kind", "difficulty", "split")


def number(text: str) -> Fraction | None:
    """Return the number that a text is, such as -1,234.5 or 3/4, exactly; None if it is none."""
    match = NUMBER.fullmatch(text.strip().replace("\N{MINUS SIGN}", "-"))
    above, below = (part.replace(",", "") for part in match.groups("1")) if match else ("0", "0")
    return Fraction(above) / int(below) if int(below) else None


def written_out(value: float | bool) -> str:
    """Return a JSON number without an exponent, and true and false as JSON writes them."""
    return str(value).lower() if isinstance(value, bool) else f"{Decimal(str(value)):f}"


@functools.lru_cache(10_000)
def parse_latex(text: str) -> list:
    """Return what math-verify reads in a formula."""
    from math_verify import parse

    return parse(text if "$" in text else f"${text}$")


def same_answer(answer: str, found: str) -> bool:
    """Whether two answers are equal: as text, as numbers, or by math-verify if the first is LaTeX.

    What tokenizers change, white space and composed letters, does not count. Of no text more than
    digits and operators is evaluated. Source for LaTeX: github.com/huggingface/Math-Verify.
    """
    if composed(answer) == composed(found):
        return True
    if (value := number(answer)) is not None:
        return value == number(found)
    if not LATEX.search(answer):
        return False
    from math_verify import verify

    return bool(verify(parse_latex(answer), parse_latex(found[:1000])))


def find_answer(text: str, pattern: re.Pattern | None) -> str | None:
    """Return the answer in a text: the last match, or its first group; None where it has none."""
    if pattern is None:
        return text.strip()
    matches = [match for match in pattern.finditer(text) if match[0]]
    return (matches[-1][min(1, pattern.groups)] or "").strip() if matches else None


def is_taken(label: str) -> bool:
    """Whether tables and logs have a name of their own that is this label."""
    return label in TAKEN or label.startswith(("accuracy_", "pass@", "verified@"))


def load_function(place: str) -> Callable | None:
    """Return the function of FILE.py:function. Raises ValueError if there is none."""
    if not place:
        return None
    file, _, name = place.rpartition(":")
    spec = spec_from_file_location(f"user's {Path(file).stem}", file)
    if spec is None or not Path(file).is_file():
        raise ValueError(f"{place}: expected FILE.py:function, of a file that is there")
    module = sys.modules[spec.name] = module_from_spec(spec)
    sys.path.append(str(Path(file).resolve().parent))  # for what it imports from beside it
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is a program
        raise ValueError(f"{place} cannot be loaded: {type(error).__name__}: {error}") from None
    if not callable(getattr(module, name, None)):
        raise ValueError(f"{file} has no function {name!r}")
    return getattr(module, name)


@dataclass(frozen=True)
class Problem:
    line: dict  # as it stands in the file
    row: dict  # its texts
    where: str  # file and line, for messages
    task: "Task"
    kind: str
    difficulty: str
    answer: str
    system: str
    explanation = prefix = ""

    def prompt(self) -> str:
        return self.row["prompt"]

    def is_correct(self, response: str, stopped: bool = True) -> bool:
        """Whether the response has ended and holds the right answer."""
        found = find_answer(response, self.task.pattern) if stopped else None
        return found is not None and same_answer(self.answer, found)

    def reward(self, response: str, stopped: bool = True) -> float:
        """Return what --reward says, or 1 for the right answer and else 0."""
        value = correct = self.is_correct(response, stopped)
        if self.task.reward:
            value = self.call("reward", response, correct)
        try:
            earned = float(value)
        except (TypeError, ValueError, OverflowError):
            earned = math.nan
        sound = abs(earned) < 1e30 and not isinstance(value, str)
        require(sound, f"{self.where}: --reward returned {value!r:.99}, not a number of use")
        return earned

    def label(self, response: str) -> str:
        """Return what --tagger says, with _ behind it if that is a name of the log's."""
        label = self.call("tagger", response) if self.task.tagger else None
        label = "" if label is None else printable(str(label))
        return label + "_" * is_taken(label)

    def call(self, name: str, *arguments):
        """Call --reward or --tagger with the file's line, and the answer if that lacks one."""
        try:
            return getattr(self.task, name)(self.row | self.line, *arguments)
        except (Exception, SystemExit) as error:  # it is a program
            fail(f"{self.where}: --{name} failed: {type(error).__name__}: {error}")


class Task:
    """The problems of a file. Raises ValueError with the line that is at fault, or OSError."""

    def __init__(self, config):
        path, flags = Path(config.data), vars(config)
        self.about = f"problems of {path.stem}"
        self.reward = load_function(flags.get("reward", ""))  # (row, response, correct) -> float
        self.tagger = load_function(flags.get("tagger", ""))  # (row, response) -> label
        try:
            self.pattern = re.compile(config.answer_pattern) if config.answer_pattern else None
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"--answer-pattern {config.answer_pattern!r}: {error}") from None
        seen, splits = {}, {"train": [], "validation": []}
        for n, row in parse_json_lines(path, path.read_bytes()):
            problem = self.read(row, f"{path}, line {n}", path.stem)
            system, prompt = composed(problem.system), composed(problem.prompt())
            key = zlib.crc32(prompt.encode()) % VALIDATION_SHARE
            split = problem.row.get("split", "train" if key else "validation")
            first_split, first = seen.setdefault((system, prompt), (split, n))
            if first_split != split:
                raise ValueError(f"{problem.where}: the prompt of line {first}, of another split")
            if split == "train" or n == first:  # validation problems are distinct
                splits[split].append(problem)
        for split, problems in splits.items():
            if not problems:
                raise ValueError(f"{path} holds no {split} problem")
        self.train, self.held_out = splits.values()
        self.train[0].reward("")  # functions that fail do so before any work
        label = self.train[0].label("")
        taken = is_taken(label.removesuffix("_"))
        require(not taken, f"--tagger says {label[:-1]!r}, a name of the log's")

    def read(self, line: dict, where: str, kind: str) -> Problem:
        """Return a line's problem. Raises ValueError if it is none that can be solved."""
        row = dict(line)
        for name in TEXTS:
            if isinstance(row.get(name, ""), int | float) and name != "prompt":
                row[name] = "difficulty " * (name == "difficulty") + written_out(row[name])
            text = row.get(name, "")
            if not isinstance(text, str) or re.search(r"[\ud800-\udfff]", text):  # half a letter
                raise ValueError(f"{where}: {name!r} is no text")
        if row.get("split", "train") not in ("train", "validation"):
            raise ValueError(f"{where}: 'split' is neither train nor validation")
        if "answer" not in row and "response" in row:
            row["answer"] = find_answer(row["response"], self.pattern) or ""
        for name in ("prompt", "answer"):
            if not row.get(name, "").strip():
                raise ValueError(f"{where}: {name!r} is missing or empty")
        self.check_answer(answer := row["answer"].strip(), row.get("response"), where)
        names = [printable(x) for x in (row.get("kind", kind), row.get("difficulty", ""))]
        if "all" in names:
            raise ValueError(f"{where}: 'all' is the name of all problems together: say 'kind'")
        return Problem(line, row, where, self, *names, answer, row.get("system", ""))

    def check_answer(self, answer: str, response: str | None, where: str) -> None:
        """Raise ValueError if an answer cannot be compared, or if the line's own is another."""
        latex = number(answer) is None and LATEX.search(answer)
        if latex and not find_spec("math_verify"):
            raise ValueError(f"{where}: to compare LaTeX, pip install math-verify")
        found = answer if response is None else find_answer(response, self.pattern)
        if found is None or not same_answer(answer, found):
            raise ValueError(f"{where}: the answer of 'response' is {found!r}, not {answer!r}")

    @property
    def words(self) -> list[str]:
        rows = [problem.row for problem in self.train + self.held_out]
        texts = [row.get(name, "") for row in rows for name in ("system", "prompt", "response")]
        texts += [row["answer"] for row in rows]
        return sorted({word for text in texts for word in text.split()})

    def sample(self, rng, split: str, index: int | None = None) -> Problem:
        problems = self.train if split == "train" else self.held_out
        return rng.choice(problems) if index is None else problems[index % len(problems)]

    def validation(self, n: int, rng) -> list[Problem]:
        return rng.sample(self.held_out, len(self.held_out))[:n]

    def solution(self, problem: Problem, strategy: str, rng) -> str:
        return problem.row["response"]

    def examples(self, rng) -> tuple[list[Problem], list[str]]:
        problems = self.train + self.held_out
        return problems, [p.row["response"] for p in problems if "response" in p.row]
