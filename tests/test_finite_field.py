"""The task: arithmetic against sympy's GF, solutions, rewards, splits that do not overlap."""

import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
from sympy import GF, isprime

from data import finite_field
from data.finite_field import (
    BACKWARD,
    COMPOSITION,
    EVALUATION,
    FORWARD,
    INVERSION,
    MATCHING_STRATEGY,
    MAX_LABEL,
    Part,
    Problem,
    Task,
    is_prime,
    is_validation,
    make_field,
    parse_range,
    vocabulary,
)
from strategies import tag


@pytest.mark.parametrize("p", [2, 3, 11, 13])
def test_arithmetic_is_that_of_sympy(p):
    field, truth = make_field(p), GF(p, symmetric=False)
    for a in range(p):
        for b in range(p):
            x, y = truth(a), truth(b)
            expected = {"+": x + y, "-": x - y, "*": x * y, "/": x / y if b else None}
            for op, value in expected.items():
                assert field.apply(op, a, b) == (None if value is None else int(value))


def test_primes():
    assert [n for n in range(-3, 200) if is_prime(n)] == [n for n in range(-3, 200) if isprime(n)]


@pytest.mark.parametrize("p", [-7, 0, 1, 4, 9, 12, 15])
def test_a_field_that_is_not_prime_is_refused(p):
    with pytest.raises(ValueError, match=f"{p} is not prime"):
        Task(p=p)


def test_names_are_a_permutation_hidden_but_fixed():
    field = make_field(11)
    assert sorted(field.names) == list(range(11)) and list(field.names) != list(range(11))
    assert field == make_field(11)
    assert [field.value(field.name(v)) for v in range(11)] == list(range(11))
    assert field.value("e11") is None


def follow(problem) -> list[str]:
    """Compute the answers of all parts with sympy, from the prompt's text alone."""
    truth, name, answers = GF(problem.field.p, symmetric=False), problem.field.name, []
    steps, given, asked = [], None, None
    for line in problem.prompt().splitlines():
        words = line.split()
        if words[0] == "start":
            steps = []
            given = words[1]
        elif words[0] == "end":
            asked = "end" if words[1] == "?" else "start"
            given = given if asked == "end" else words[1]
            x = truth(problem.field.value(answers[-1] if given == "carry" else given))
            for op, operand in steps if asked == "end" else reversed(steps):
                y = truth(problem.field.value(operand))
                x = (
                    {"+": x + y, "*": x * y}[op]
                    if asked == "end"
                    else {"+": x - y, "*": x / y if y else 0}[op]
                )
            answers.append(name(int(x)))
        elif words[0].endswith(":") and len(words) == 3:
            steps.append((words[1], words[2]))
    return answers


TASKS = {
    "easy": Task(),
    "hard": Task((6, 9)),
    "extreme": Task((6, 15)),
    "gf13": Task(p=13),
    "gf2": Task(p=2),
    "shown": Task(relabel="shown"),
    "composition": Task((2, 5), parts=(2, 5)),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_answers_solutions_and_reward(task):
    rng = random.Random(0)
    for _ in range(100):
        problem = task.sample(rng, "train")
        assert follow(problem)[-1] == problem.answer
        words = set(vocabulary(task.p))
        assert words.issuperset(problem.prompt().split())
        solutions = [task.solution(problem, way, rng) for way in (FORWARD, BACKWARD, "mixed")]
        for solution in solutions:
            assert words.issuperset(solution.split())
            assert problem.reward(solution) == 1.0
        assert problem.solution(FORWARD).count("guess") == sum(
            part.kind == INVERSION for part in problem.parts
        )
        labels = [label for i in range(len(problem.parts)) for label in problem.labels(i)]
        assert [line.split()[0] for line in problem.prompt().splitlines() if line[0].isdigit()] == [
            f"{n}:" for n in labels
        ]
        assert (
            labels == list(range(labels[0], labels[-1] + 1))
            and 1 <= labels[0] <= labels[-1] <= MAX_LABEL
        )


def test_both_types_and_every_length_come_up():
    rng = random.Random(0)
    problems = [Task((6, 9)).sample(rng, "train") for _ in range(400)]
    assert {p.steps for p in problems} == {6, 7, 8, 9}
    assert 150 < sum(p.kind == EVALUATION for p in problems) < 250
    skewed = [Task(evaluation_share=0.9).sample(rng, "train").kind for _ in range(400)]
    assert 330 < skewed.count(EVALUATION) < 390
    assert Task(parts=(2, 3)).sample(rng, "train").kind == COMPOSITION


def test_a_wrong_guess_gives_a_wrong_answer():
    """The strategy that does not match is right for one guess in p."""
    rng, right = random.Random(0), 0
    for _ in range(100):
        problem = Task().sample(rng, "train")
        other = BACKWARD if MATCHING_STRATEGY[problem.kind] == FORWARD else FORWARD
        right += sum(problem.reward(problem.solution(other, [g])) for g in range(11))
    assert right == 100


def test_reward_takes_the_last_word_only():
    problem = Task().sample(random.Random(0), "train")
    right = problem.answer
    wrong = next(f"e{i}" for i in range(11) if f"e{i}" != right)
    assert problem.reward(f"answer {right}") == 1.0
    assert problem.reward(f"answer {right}\n") == 1.0
    for text in (
        "",
        right,
        f"answer {wrong}",
        f"answer {right} answer {wrong}",
        f"answer {right} {wrong}",
    ):
        assert problem.reward(text) == 0.0
    assert problem.reward(f"answer {right}1") == problem.reward(f"nonanswer {right}") == 0.0


@pytest.mark.parametrize(
    "task", [Task((2, 2)), Task((2, 5)), Task((6, 9))], ids=["2", "2-5", "6-9"]
)
def test_training_and_validation_never_overlap(task):
    """No validation problem comes up in training, not even under other labels."""
    rng = random.Random(0)
    seen = {split: set() for split in ("train", "validation")}
    for split, contents in seen.items():
        for _ in range(3000):
            problem = task.sample(rng, split)
            assert is_validation(problem) == (split == "validation")
            contents.add(tuple((part.kind, part.given, part.steps) for part in problem.parts))
    assert not seen["train"] & seen["validation"]
    assert len(seen["validation"]) > 500


def test_streams_are_seeded():
    def draw(seed):
        rng = random.Random(seed)
        return [Task().sample(rng, "train") for _ in range(5)]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": (0, 3)},
        {"steps": (5, 2)},
        {"parts": (0, 1)},
        {"steps": (2, MAX_LABEL + 1)},
        {"evaluation_share": 1.5},
        {"relabel": "none"},
    ],
)
def test_impossible_tasks_are_refused(bad):
    with pytest.raises(ValueError):
        Task(**bad)


def test_an_empty_stream_is_refused():
    """GF(2) has six evaluation problems of one step, and none of them falls into validation."""
    with pytest.raises(ValueError, match="no validation problems"):
        Task((1, 1), p=2, evaluation_share=1.0).sample(random.Random(0), "validation")


def test_the_example_in_the_docstring_is_real():
    field = make_field(11)
    start, three, four, end = (field.value(name) for name in ("e9", "e3", "e4", "e0"))
    problem = Problem(
        field, (Part(EVALUATION, start, (("*", three), ("+", four)), end),), first_label=29
    )
    text = " ".join(finite_field.__doc__.split())
    for line in (
        problem.prompt() + problem.solution(FORWARD) + "\n" + problem.solution(BACKWARD)
    ).splitlines():
        assert line in text


def test_ranges():
    assert parse_range("3-7") == (3, 7) and parse_range("4") == (4, 4)
    for text in ("", "a", "3-", "-3", "3-7-9", "3 7"):
        with pytest.raises(ValueError):
            parse_range(text)


def run(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data.finite_field", *flags], capture_output=True, text=True
    )


def test_command_prints_problems_with_both_solutions():
    done = run("--difficulty", "hard", "--n", "3")
    assert done.returncode == 0
    assert done.stdout.count("[forward]") == done.stdout.count("[backward]") == 3


@pytest.mark.parametrize(
    "flags",
    [
        ("--field", "12"),
        ("--steps", "x"),
        ("--n", "-1"),
        ("--nonsense", "1"),
        ("--difficulty", "none"),
    ],
)
def test_command_refuses_in_one_line(flags):
    done = run(*flags)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_a_problem_may_use_up_all_labels():
    labels = Task((MAX_LABEL, MAX_LABEL)).sample(random.Random(0), "train").labels(0)
    assert labels == range(1, MAX_LABEL + 1)
    ends = {Task((2, 2)).sample(random.Random(i), "train").labels(0)[-1] for i in range(500)}
    assert ends == {*range(2, MAX_LABEL + 1)}


def test_both_operations_are_as_frequent():
    drawn = [Task((6, 9)).sample(random.Random(i), "train") for i in range(300)]
    operations = [op for problem in drawn for part in problem.parts for op, _ in part.steps]
    assert 0.46 < operations.count("+") / len(operations) < 0.54


def test_a_small_task_gives_nearly_all_of_its_validation_problems():
    """Repetitions end the search only if 300 come in a row."""
    task, stream = Task((1, 2), p=5), random.Random(0)
    every = {task.sample(stream, "validation").parts for _ in range(5000)}
    found = task.validation(10_000, random.Random(1))
    assert 0.95 * len(every) < len(found) <= len(every) + 1 and len(every) > 60


def test_a_window_wider_than_a_problem_leaves_all_its_parts_free():
    task, stream = Task((1, 2), parts=(3, 3), window=5), random.Random(0)
    problems = [task.sample(stream, "train") for _ in range(20)]
    assert not any(problem.prefix for problem in problems)
    firsts = [task.solution(problem, "mixed", stream).split()[0] for problem in problems]
    assert 0 < firsts.count("guess") < 20, "the first part takes either strategy"


def test_a_task_is_that_of_the_flags():
    flags = {"steps": "", "difficulty": "hard", "parts": "2-3", "field": 13, "relabel": "shown"}
    config = SimpleNamespace(**flags, evaluation_share=0.9, window=2)
    assert Task.from_flags(config) == Task((6, 9), 13, "shown", 0.9, (2, 3), 2)
    assert Task.from_flags(config, 11, "fixed") == Task((6, 9), 11, "fixed", 0.9, (2, 3), 2)


def test_mixed_solutions_take_either_strategy_as_often():
    task, stream = Task((1, 1)), random.Random(0)
    problems = [task.sample(stream, "train") for _ in range(400)]
    found = [tag(x, task.solution(x, "mixed", stream)).strategy for x in problems]
    assert 160 < found.count(FORWARD) < 240
