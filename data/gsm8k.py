r"""Turn GSM8K's lines, or a file like it, into problems of ours, with worked solutions for SFT.

    python -m data.gsm8k train.jsonl > gsm8k.jsonl
    python train_grpo.py --init MODEL --data gsm8k.jsonl --answer-pattern '#### (\S+)'

A line is {"question": ..., "answer": "reasoning\n#### 42"} (arXiv 2110.14168).
"""

import json
import sys
from pathlib import Path

from lib.flags import parse_json_lines, quiet_pipes, require, user_errors

SYSTEM = "Solve the problem step by step. End with a line that holds #### and the number alone."


def problem_of(row: dict) -> dict:
    """Return a problem. Raises ValueError if the row is none of GSM8K's."""
    question, solution = row.get("question"), row.get("answer")
    if not (isinstance(question, str) and isinstance(solution, str) and "####" in solution):
        raise ValueError("expected a question, and an answer that ends in #### and a number")
    steps = len(solution.strip().split("\n")) - 1
    problem = {"prompt": question, "response": solution, "system": SYSTEM}
    return problem | {"answer": solution.rpartition("####")[2].strip(), "difficulty": steps}


@user_errors()
def main(path: Path) -> None:
    for number, row in parse_json_lines(path, path.read_bytes()):
        with user_errors(f"{path}, line {number}: "):
            print(json.dumps(problem_of(row)))


if __name__ == "__main__":
    with quiet_pipes():
        require(len(sys.argv) == 2, "usage: python -m data.gsm8k FILE.jsonl > gsm8k.jsonl")
        main(Path(sys.argv[1]))
