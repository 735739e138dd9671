"""Write problems of the package reasoning-gym: the name of a task, and its settings.

pip install reasoning-gym==0.1.25
python -m data.reasoning_gym chain_sum max_terms=3 max_digits=2 --n 2000 > sums.jsonl
"""

import json
from dataclasses import dataclass, field

from lib.flags import fail, parse_flags, quiet_pipes, require, require_min


@dataclass
class GymConfig:
    task: list = field(default_factory=list)  # such as chain_sum, then settings: max_terms=3
    n: int = 1000  # number of problems
    seed: int = 0  # of the problems
    system: str = ""  # a system prompt


def main(config: GymConfig) -> None:
    require_min(config, n=1)
    require(bool(config.task), "name a task, such as chain_sum")
    try:
        import reasoning_gym

        settings = dict(setting.split("=") for setting in config.task[1:])
        settings = {name: json.loads(value) for name, value in settings.items()}
        options = {"size": config.n, "seed": config.seed, **settings}
        problems = reasoning_gym.create_dataset(config.task[0], **options)
    except (ImportError, ValueError, TypeError, AssertionError) as error:
        fail(f"{' '.join(config.task)}: {error}")
    for item in problems:
        facts = item["metadata"]
        known = [key for key in facts.get("difficulty", {}) if isinstance(facts.get(key), int)]
        difficulty = ", ".join(f"{facts[key]} {key.removeprefix('num_')}" for key in known)
        row = {"prompt": item["question"], "answer": item["answer"], "difficulty": difficulty}
        print(json.dumps(row | ({"system": config.system} if config.system else {})))


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(GymConfig, __doc__, positional="task"))
