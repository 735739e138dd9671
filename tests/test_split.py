"""The split of the gain against policies whose truth is known."""

import random

import numpy as np
import pytest

from data.finite_field import BACKWARD, EVALUATION, FITTING, FORWARD, INVERSION
from split import CAUSES, contributions, explain, interval
from strategies import ARITHMETIC, NO_ANSWER, NONE, SKIPPED, Response

OTHER = {FORWARD: BACKWARD, BACKWARD: FORWARD}


def sample(fit_share, fit_accuracy, other_accuracy=1 / 11, cause=ARITHMETIC, n=600, samples=4, seed=0):
    """Responses of a policy that takes the fitting strategy with a given chance and succeeds with another.

    Problems differ: on half of them the fitting strategy is taken a fifth less often, on the others more.
    """
    rng, judged = random.Random(seed), []
    for i in range(n):
        kind, steps = (EVALUATION, INVERSION)[i % 2], 6 + i % 4
        share = fit_share if fit_share in (0, 1) else fit_share * (0.8 if i % 3 else 1.4)
        group = []
        for _ in range(samples):
            fits = rng.random() < share
            right = rng.random() < (fit_accuracy if fits else other_accuracy)
            strategy = FITTING[kind] if fits else OTHER[FITTING[kind]]
            error = None if right or not fits else cause
            group.append(Response(kind, steps, strategy, fits, right, error, True))
        judged.append(group)
    return judged


def near(figure, truth, slack=0.035):
    return abs(figure["mean"] - truth) < slack and figure["ci95"][0] - slack / 2 < truth < figure["ci95"][1] + slack / 2


def gain(before, after):
    return np.mean([r.correct for g in after for r in g]) - np.mean([r.correct for g in before for r in g])


def test_pure_selection():
    reasons = explain(sample(0.5, 0.8), sample(1.0, 0.8, seed=1))["overall"]
    assert near(reasons["selection"], 0.5 * (0.8 - 1 / 11)) and near(reasons["improvement"], 0)


def test_pure_improvement():
    reasons = explain(sample(0.5, 0.4), sample(0.5, 0.9, seed=1))["overall"]
    assert near(reasons["selection"], 0) and near(reasons["improvement"], 0.5 * 0.5)
    assert near(reasons["arithmetic"], 0.25) and near(reasons["procedure"], 0) and near(reasons["guess"], 0)


def test_both():
    reasons = explain(sample(0.5, 0.6), sample(1.0, 1.0, seed=1))["overall"]
    assert near(reasons["selection"], 0.5 * (0.8 - 1 / 11)) and near(reasons["improvement"], 0.75 * 0.4)


def test_neither():
    reasons = explain(sample(0.5, 0.6), sample(0.5, 0.6, seed=1))["overall"]
    for name in ("gain", "selection", "improvement", *CAUSES):
        low, high = reasons[name]["ci95"]
        assert low - 0.01 <= 0 <= high + 0.01


@pytest.mark.parametrize("samples", [1, 4])
def test_few_samples_do_not_bias_the_split(samples):
    """Over many draws, with problems on which by chance a strategy was never taken."""
    truth = 0.5 * (0.8 - 1 / 11), 0.75 * 0.4
    found = [
        contributions(sample(0.5, 0.6, n=80, samples=samples, seed=i), sample(1.0, 1.0, n=80, samples=samples, seed=-i))
        for i in range(1, 40)
    ]
    means = [np.mean([f[name].mean() for f in found]) for name in ("selection", "improvement")]
    assert means == pytest.approx(truth, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_add_up_exactly(seed):
    """On every problem, whatever the responses; also with strategies that one side never takes."""
    rng = random.Random(seed)

    def anything(used):
        group = []
        for _ in range(40):
            kind, steps, responses = rng.choice((EVALUATION, INVERSION)), rng.randint(6, 7), []
            for _ in range(3):
                strategy = rng.choice(used)
                right = rng.random() < 0.5
                error = None if right else rng.choice((None, ARITHMETIC, SKIPPED, NO_ANSWER))
                responses.append(Response(kind, steps, strategy, strategy == FORWARD, right, error, True))
            group.append(responses)
        return group

    before, after = anything((FORWARD, NONE)), anything((FORWARD, BACKWARD))
    after = [[Response(b[0].kind, b[0].steps, *list(vars(r).values())[2:]) for r in a] for a, b in zip(after, before)]
    parts = contributions(before, after)
    for x, (a, b) in enumerate(zip(before, after)):
        expected = np.mean([r.correct for r in b]) - np.mean([r.correct for r in a])
        assert parts["selection"][x] + parts["improvement"][x] == pytest.approx(expected)
        assert sum(parts[cause][x] for cause in CAUSES) == pytest.approx(parts["improvement"][x])


def test_a_strategy_that_one_side_never_takes_counts_as_selection():
    before, after = sample(0.0, 1.0), sample(1.0, 0.9, seed=1)
    reasons = explain(before, after)
    assert reasons["overall"]["improvement"]["mean"] == pytest.approx(0)
    assert reasons["overall"]["selection"]["mean"] == pytest.approx(gain(before, after))


def test_groups_and_intervals():
    before, after = sample(0.5, 0.6, cause=SKIPPED), sample(1.0, 1.0, seed=1)
    reasons = explain(before, after)
    assert set(reasons["by_type"]) == {EVALUATION, INVERSION} and set(reasons["by_steps"]) == {"6", "7", "8", "9"}
    mean = np.mean([reasons["by_steps"][n]["selection"]["mean"] for n in reasons["by_steps"]])
    assert mean == pytest.approx(reasons["overall"]["selection"]["mean"])
    assert near(reasons["overall"]["procedure"], 0.3) and reasons["overall"]["arithmetic"]["mean"] == pytest.approx(0)

    rng = np.random.default_rng(0)
    held = 0
    for seed in range(300):
        low, high = interval(rng.normal(0.1, 1, 150), seed, 500)
        held += low < 0.1 < high
    assert 0.91 < held / 300 < 0.985
