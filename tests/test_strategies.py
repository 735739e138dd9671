"""The tagger: it names every solution's strategy, finds every change, and takes any text."""

import random
import subprocess
import sys

import pytest
import torch
from conftest import small_model, word_tokenizer

from data.finite_field import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    INVERSION,
    MATCHING_STRATEGY,
    Part,
    Problem,
    Task,
    make_field,
    vocabulary,
)
from rollout import Sampler
from strategies import (
    ARITHMETIC,
    FORMAT,
    GUESS,
    MIXED,
    NO_ANSWER,
    NONE,
    OPERAND,
    ORDER,
    SKIPPED,
    matches,
    parse_lines,
    score_response,
    score_rollout,
    split_parts,
    strategy_of,
    tag,
)

TASKS = {
    "easy": Task((2, 5)),
    "one step": Task((1, 1)),
    "extreme": Task((6, 15)),
    "gf13": Task((2, 5), p=13),
    "shown": Task((2, 5), relabel="shown"),
    "composition": Task((2, 4), parts=(2, 5)),
}


def problems(task: Task, n: int = 60):
    rng = random.Random(0)
    return [task.sample(rng, "train") for _ in range(n)], rng


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_solution_is_tagged_as_what_it_is(task):
    for problem in problems(task)[0]:
        for strategy in (FORWARD, BACKWARD):
            found = tag(problem, problem.solution(strategy))
            assert found.strategy == strategy and found.error is None
            assert found.guessed == tuple(
                MATCHING_STRATEGY[part.kind] != strategy for part in problem.parts
            )
            assert matches(problem, found) == all(
                MATCHING_STRATEGY[part.kind] == strategy for part in problem.parts
            )


def test_a_composition_is_split_into_its_parts():
    for problem in problems(TASKS["composition"])[0]:
        strategies = [MATCHING_STRATEGY[part.kind] for part in problem.parts]
        found = tag(problem, problem.solution(strategies))
        assert found.parts == tuple(strategies) and found.error is None and matches(problem, found)
        assert found.strategy == (strategies[0] if len(set(strategies)) == 1 else MIXED)


def test_a_wrong_guess_carried_through_is_no_error():
    problems_, rng = problems(TASKS["composition"])
    for problem in problems_:
        guesses = [rng.randrange(11) for _ in problem.parts]
        found = tag(problem, problem.solution(FORWARD, guesses))
        assert found.error is None and found.strategy == FORWARD


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_one_changed_symbol_is_found_where_it_is(task):
    """Change each symbol of each step to any other word, and to another word of its kind."""
    words = vocabulary(task.p)
    for problem in problems(task, 8)[0]:
        for strategy in (FORWARD, BACKWARD):
            lines = problem.solution(strategy).split("\n")
            rng = random.Random(1)
            for i, line in enumerate(lines):
                if "=" not in line:
                    continue
                symbols = line.split()
                for j, symbol in enumerate(symbols):
                    alike = [
                        w
                        for w in words
                        if w[0] == symbol[0] and w[-1:].isdigit() == symbol[-1:].isdigit()
                    ]
                    for word in (rng.choice(words), rng.choice(alike or words)):
                        if word == symbol:
                            continue
                        changed = " ".join([*symbols[:j], word, *symbols[j + 1 :]])
                        found = tag(problem, "\n".join([*lines[:i], changed, *lines[i + 1 :]]))
                        assert found.error is not None
                        assert found.error.line == i, changed
                        assert found.error.due.split()[0] == symbols[0]
                        assert found.strategy in (strategy, NONE, MIXED)
                        if task is TASKS["easy"]:
                            assert found.strategy == strategy


@pytest.fixture
def example() -> Problem:
    """start e0, + 1, * 2, + 3 -> 5, in GF(11) under names that are the values themselves."""
    field = make_field(11).__class__(11, tuple(range(11)))
    return Problem(field, (Part(EVALUATION, 0, (("+", 1), ("*", 2), ("+", 3)), 5),), first_label=7)


GOOD = ["start e0", "7: e0 + e1 = e1", "8: e1 * e2 = e2", "9: e2 + e3 = e5", "end e5", "answer e5"]


@pytest.mark.parametrize(
    "line, text, kind",
    [
        (2, "8: e1 * e2 = e3", ARITHMETIC),
        (2, "8: e4 * e2 = e8", OPERAND),
        (2, "8: e1 * e3 = e3", OPERAND),
        (2, "8: e1 + e2 = e3", OPERAND),
        (2, "9: e1 + e3 = e4", SKIPPED),
        (2, "7: e1 + e1 = e2", ORDER),
        (2, "30: e1 * e2 = e2", ORDER),
        (2, "8: e1 * e2 e2", FORMAT),
        (2, "08: e1 * e2 = e2", FORMAT),
        (2, "8: e1 * e2 = e02", FORMAT),
        (0, "start e4", OPERAND),
        (0, "6: start e0", FORMAT),
        (4, "end e6", OPERAND),
        (4, "answer e5", SKIPPED),
        (5, "answer e6", OPERAND),
    ],
)
def test_kinds_of_error(example, line, text, kind):
    assert tag(example, "\n".join(GOOD)).error is None
    found = tag(example, "\n".join([*GOOD[:line], text, *GOOD[line + 1 :]]))
    assert (found.error.kind, found.error.line) == (kind, line)


def test_what_is_cut_off_or_added(example):
    for n in range(1, len(GOOD)):
        found = tag(example, "\n".join(GOOD[:n]))
        assert (found.error.kind, found.error.line) == (NO_ANSWER, n)
    assert tag(example, "\n".join([*GOOD, "answer e5"])).error.kind == ORDER
    assert tag(example, "\n".join([*GOOD, "so there"])).error.kind == FORMAT
    assert tag(example, "").strategy == NONE


def test_a_part_that_goes_both_ways_is_mixed(example):
    both = "start e0\n7: e0 + e1 = e1\n9: e5 - e3 = e2\n8: e2 / e2 = e1\nend e5\nanswer e5"
    assert tag(example, both).strategy == MIXED


def test_an_inversion_solved_forward_does_not_match(example):
    part = example.parts[0]
    inversion = Problem(example.field, (Part(INVERSION, part.start, part.steps, part.end),), 7)
    found = tag(inversion, inversion.solution(FORWARD))
    assert found.guessed == (True,) and not matches(inversion, found) and found.error is None


def test_a_wrong_guess_comes_before_what_it_leads_to(example):
    """It is the error of a response, whether the wrong value is then carried on well or badly."""
    guess = "guess end e4\n9: e4 - e3 = e1\n8: e1 / e2 = e6\n7: e6 - e1 = e5\nstart e5\nanswer e4"
    slip = guess.replace("e4 - e3 = e1", "e4 - e3 = e2")
    assert (
        score_response(example, guess, True).error
        == score_response(example, slip, True).error
        == GUESS
    )
    assert tag(example, guess).error is None and tag(example, slip).error.kind == ARITHMETIC
    right = guess.replace("end e4\n9: e4 - e3 = e1", "end e5\n9: e5 - e3 = e9")
    assert score_response(example, right, True).error == ARITHMETIC, (
        "line 8: is wrong, the guess is right"
    )

    parts = tuple(Part(kind, 0, (("+", 1),), 1) for kind in (EVALUATION, INVERSION))
    composition = Problem(example.field, parts, 7)
    for first, error in (("7: e0 + e1 = e1", GUESS), ("7: e0 + e1 = e2", ARITHMETIC)):
        end = first[-2:]
        text = f"start e0\n{first}\nend {end}\nguess start e3\n8: e3 + e1 = e4\nend e4\nanswer e3"
        assert score_response(composition, text, True).error == error


def test_line_breaks_do_not_matter(example):
    assert parse_lines("\n".join(GOOD)) == parse_lines(" ".join(GOOD))


def test_random_text_never_raises():
    problems_, rng = problems(TASKS["composition"], 20)
    words = [
        *vocabulary(11),
        "e99",
        "9" * 5000 + ":",
        "e" + "9" * 5000,
        "answer",
        "\n",
        "é",
        "",
        "start end",
        "0:",
    ]
    for problem in problems_:
        for _ in range(100):
            tag(problem, " ".join(rng.choices(words, k=rng.randrange(60))))
        tag(problem, "".join(chr(rng.randrange(1, 0x3000)) for _ in range(300)))


def test_an_answer_that_was_never_finished_is_not_right():
    """The token limit cut it off after `answer e1`; it may have been going on to e10."""
    problem = Task((2, 2)).sample(random.Random(0), "train")
    text = problem.solution(FORWARD if problem.kind == EVALUATION else BACKWARD)
    whole, cut = (score_response(problem, text, stopped) for stopped in (True, False))
    assert whole.correct and whole.reward == 1 and whole.error is None
    assert not cut.correct and cut.reward == 0 and cut.error == NO_ANSWER
    assert cut.strategy == whole.strategy and cut.matches


@pytest.mark.parametrize("limit", ["before the stop token", "at the stop token"])
def test_the_sampler_says_what_was_cut_off(limit, monkeypatch):
    """A response whose stop token just fits is finished; one token less, and it is wrong."""
    tokenizer, model = word_tokenizer(11), small_model()
    problem = Task((2, 2)).sample(random.Random(0), "train")
    solution = tokenizer.solution(problem.solution(FORWARD))
    script = iter(solution)

    def sample_tokens(logits, uniforms, temperature):
        tokens = torch.full((len(logits),), next(script))
        return tokens, torch.zeros(len(logits))

    monkeypatch.setattr("rollout.sample_tokens", sample_tokens)
    T = len(solution) - (limit == "before the stop token")
    rollout = Sampler(model, tokenizer.stops, 1, T).sample([tokenizer.prompt(problem)], [(0,)])
    score_rollout(rollout, [problem], tokenizer)
    right = 1.0 if limit == "at the stop token" else 0.0
    assert rollout.rewards.tolist() == [[right]] and rollout.scored[0][0].correct == bool(right)


def test_the_tagger_needs_no_torch():
    """So that it tags anybody's responses at once, and anywhere."""
    code = "import sys, strategies; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


FORTH, BACK = "8: e1 + e2 = e3", "9: e4 - e1 = e3"


@pytest.mark.parametrize(
    "text, strategy",
    [
        (f"{FORTH} {BACK}", MIXED),
        (f"{FORTH} {FORTH} {BACK}", FORWARD),
        (f"{FORTH} {BACK} {BACK}", BACKWARD),
        (f"start e0 {FORTH} {BACK}", FORWARD),
        (f"end e0 {FORTH} {BACK}", BACKWARD),
        (f"{FORTH} {BACK} end e3", FORWARD),
        (f"{FORTH} {BACK} start e3", BACKWARD),
        (f"start e0 {BACK}", MIXED),
        (f"end e0 {FORTH}", MIXED),
        ("start e0 end e0", NONE),
    ],
)
def test_two_thirds_of_the_votes_decide(text, strategy):
    """Those of the steps, and one each of opening and closing."""
    assert strategy_of(parse_lines(text)) == strategy


def test_a_part_without_a_step_still_ends_with_its_closing():
    chunks = split_parts(parse_lines(f"start e0 end e1 start e1 {FORTH} end e3 answer e3"))
    assert [len(chunk) for chunk in chunks] == [2, 3]


def test_a_part_that_was_not_reached_has_no_say():
    """Nor does one part's guess need the other's."""
    for problem in problems(Task((2, 4), parts=(2, 2)))[0]:
        for strategy in (FORWARD, BACKWARD):
            lines = problem.solution(strategy).split("\n")
            first = "\n".join(lines[: len(problem.parts[0].steps) + 2])
            assert tag(problem, first).parts == (strategy, NONE)
            assert tag(problem, first).strategy == strategy
            guesses = [MATCHING_STRATEGY[part.kind] != strategy for part in problem.parts]
            assert score_response(problem, "\n".join(lines)).guess == any(guesses)


def test_an_opening_of_the_other_side_is_out_of_turn(example):
    assert tag(example, "\n".join(["end e5", *GOOD[1:]])).error.kind == SKIPPED


@pytest.mark.parametrize("text", ["answer e1x", "start e3,", "8: e3 + e4 = e0.", "xanswer e1"])
def test_a_line_ends_with_a_word(text):
    """What is written on behind it is a line of another form."""
    (line,) = parse_lines(text)
    assert line.form == "other"
