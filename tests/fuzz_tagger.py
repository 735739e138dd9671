"""Properties of the tagger and the reward for any text, and a fuzzer that looks for exceptions.

pip install -r .ci/requirements-dev.txt && python tests/fuzz_tagger.py -max_total_time=600
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.finite_field import BACKWARD, FORWARD, Problem, Task, vocabulary
from strategies import MIXED, NONE, matches, parse_lines, score_response, tag

TASKS = [
    Task((1, 3)),
    Task((2, 5), p=13),
    Task((1, 2), parts=(2, 3)),
    Task((1, 2), relabel="shown", p=3),
]


def problem_number(n: int) -> Problem:
    return TASKS[n % len(TASKS)].sample(random.Random(n), "train")


def check(problem: Problem, text: str) -> None:
    normal = " ".join(text.split())
    assert " ".join(line.text for line in parse_lines(text)) == normal, (
        "lines hold whole words, and no word is lost"
    )
    found = tag(problem, text)
    assert found == tag(problem, normal), "line breaks do not matter"
    assert found.strategy in (FORWARD, BACKWARD, MIXED, NONE)
    assert len(found.parts) == len(found.guessed) == len(problem.parts)
    right = problem.reward(text) == 1.0
    assert any(found.guessed) or not found.misguessed
    assert score_response(problem, text, True).correct == right
    if found.error is None:
        assert NONE not in found.parts and MIXED not in found.parts
        assert right != found.misguessed, (
            "a response without error is right unless it guessed wrong"
        )
        assert matches(problem, found) != any(found.guessed)


def mutated(problem: Problem, choose) -> str:
    """Change, drop, repeat or move words of a solution; `choose(n)` gives a number below n."""
    words = problem.solution([(FORWARD, BACKWARD)[choose(2)] for _ in problem.parts]).split(" ")
    known = [
        *vocabulary(problem.field.p),
        "e٣",
        "e99999",
        "x",
        "",
        "\n",
        "answer",
        "e1:",
        "12:",
        "²:",
        "\x1c",
    ]
    for _ in range(choose(6)):
        i, j = choose(len(words)), choose(len(words))
        how = choose(5)
        if how == 0:
            words[i] = known[choose(len(known))]
        elif how == 1:
            words.insert(i, words[j])
        elif how == 2:
            words[i], words[j] = words[j], words[i]
        elif how == 3:
            words[i] += known[choose(len(known))]
        elif len(words) > 1:
            del words[i]
    return " ".join(words)


def one_input(data: bytes) -> None:
    provider = atheris.FuzzedDataProvider(data)
    problem = problem_number(provider.ConsumeIntInRange(0, 400))
    if provider.ConsumeBool():
        text = mutated(problem, lambda n: provider.ConsumeIntInRange(0, n - 1))
    else:
        text = provider.ConsumeUnicodeNoSurrogates(sys.maxsize)
    check(problem, text)


if __name__ == "__main__":
    import atheris

    atheris.instrument_all()  # modules imported before, too
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
