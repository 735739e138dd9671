"""Write problems of reasoning-gym (pip install reasoning-gym==0.1.25): a task, and its settings.

python -m data.reasoning_gym chain_sum max_terms=2 max_digits=2 --n 2000 > sums.jsonl
"""

import json
import re
from dataclasses import dataclass, field
from importlib import import_module

from lib.flags import fail, parse_flags, quiet_pipes


@dataclass
class GymConfig:
    task: list = field(default_factory=list)  # its name, then settings such as max_terms=3
    n: int = 1000  # number of problems
    seed: int = 0  # of the problems


def form(row: dict, response: str) -> str:
    """Tag a response by its form, for --tagger data/reasoning_gym.py:form."""
    return "number" if re.fullmatch(r"\s*-?\d+\.?\s*", response) else "words"


def main(config: GymConfig) -> None:
    try:
        how = {name: json.loads(x) for name, x in (word.split("=") for word in config.task[1:])}
        how = {"size": config.n, "seed": config.seed} | how
        problems = [*import_module("reasoning_gym").create_dataset(config.task[0], **how)]
    except (ImportError, IndexError, ValueError, TypeError, AssertionError) as error:
        fail(f"reasoning_gym {' '.join(config.task)}: {error}")
    for item in problems:
        row = {"prompt": item["question"], "answer": item["answer"]}
        print(json.dumps(row | {"difficulty": item["metadata"].get("num_digits", "")}))


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(GymConfig, __doc__, positional="task"))
