"""decompose_gain on simulated policies whose selection and improvement are known."""

import random
from dataclasses import replace

import numpy as np
import pytest
from conftest import response

from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION, MATCHING_STRATEGY
from lib.gain import CAUSES, compare, decompose_gain
from strategies import ARITHMETIC, GUESS, NO_ANSWER, NONE, SKIPPED

OTHER = {FORWARD: BACKWARD, BACKWARD: FORWARD}


def sample(match_rate, accuracy, other_accuracy=1 / 11, cause=ARITHMETIC, n=600, samples=4, seed=0):
    """Return responses of a policy that takes the matching strategy with a given chance.

    On half of the problems it takes that strategy a fifth less often, on the others more.
    """
    rng, scored = random.Random(seed), []
    for i in range(n):
        kind, steps = (EVALUATION, INVERSION)[i % 2], 6 + i % 4
        share = match_rate if match_rate in (0, 1) else match_rate * (0.8 if i % 3 else 1.4)
        group = []
        for _ in range(samples):
            matches = rng.random() < share
            right = rng.random() < (accuracy if matches else other_accuracy)
            strategy = MATCHING_STRATEGY[kind] if matches else OTHER[MATCHING_STRATEGY[kind]]
            error = None if right else cause if matches else GUESS
            group.append(response(kind, steps, strategy, matches, right, error, True))
        scored.append(group)
    return scored


def near(part, truth, slack=0.035):
    low, high = part["ci95"]
    return abs(part["mean"] - truth) < slack and low - slack / 2 < truth < high + slack / 2


def gain(before, after):
    right = ([r.correct for group in scored for r in group] for scored in (before, after))
    first, second = map(np.mean, right)
    return second - first


def test_pure_selection():
    reasons = decompose_gain(sample(0.5, 0.8), sample(1.0, 0.8, seed=1))["overall"]
    assert near(reasons["selection"], 0.5 * (0.8 - 1 / 11)) and near(reasons["improvement"], 0)


def test_pure_improvement():
    reasons = decompose_gain(sample(0.5, 0.4), sample(0.5, 0.9, seed=1))["overall"]
    assert near(reasons["selection"], 0) and near(reasons["improvement"], 0.5 * 0.5)
    assert (
        near(reasons["arithmetic"], 0.25)
        and near(reasons["procedure"], 0)
        and near(reasons["guess"], 0)
    )


def test_neither():
    reasons = decompose_gain(sample(0.5, 0.6), sample(0.5, 0.6, seed=1))["overall"]
    for name in ("selection", "improvement", *CAUSES):
        low, high = reasons[name]["ci95"]
        assert low - 0.01 <= 0 <= high + 0.01


@pytest.mark.parametrize(
    "before, after, samples, coverage",
    [
        ((0.5, 0.6), (1.0, 1.0), 1, 0.85),  # some strategies are never taken on some problems
        ((0.5, 0.6), (1.0, 1.0), 4, 0.85),
        ((0.02, 0.5), (1.0, 1.0), 4, 0.75),  # six responses in all take one strategy
        ((0.02, 0.2), (0.3, 0.9), 4, 0.75),
    ],
)
def test_means_and_intervals_over_many_draws(before, after, samples, coverage):
    """The parts are right on average, and 95% intervals hold the truth about that often.

    The bounds allow for 40 draws, where 95% may look like 85%, and for strategies that only a few
    responses take, whose intervals are a little too narrow.
    """
    (share, skill), (share_after, skill_after), other = before, after, 1 / 11
    truth = {
        "selection": (share_after - share) * ((skill + skill_after) / 2 - other),
        "improvement": (share + share_after) / 2 * (skill_after - skill),
    }
    draws = [
        decompose_gain(
            sample(*before, n=80, samples=samples, seed=i),
            sample(*after, n=80, samples=samples, seed=-i),
            resamples=100,
        )
        for i in range(1, 41)
    ]
    for name, true in truth.items():
        found = [draw["overall"][name] for draw in draws]
        error = np.std([f["mean"] for f in found]) / len(found) ** 0.5
        assert abs(np.mean([f["mean"] for f in found]) - true) < 3 * error + 0.02
        assert np.mean([f["ci95"][0] <= true <= f["ci95"][1] for f in found]) >= coverage


def test_problems_on_which_strategies_fare_differently():
    """Where every strategy was taken on every problem, nothing is imputed.

    The matching strategy is taken more often where it works, yet only selection changes.
    """

    def group(i, n_matching):
        right = 8 if i % 2 else 4  # of 8 matching responses
        responses = [
            response(EVALUATION, 6, FORWARD, True, j % 8 < right, None, True)
            for j in range(n_matching)
        ]
        wrong = response(EVALUATION, 6, BACKWARD, False, False, GUESS, True)
        return responses + [wrong] * (48 - n_matching)

    before = [group(i, 40 if i % 2 else 8) for i in range(40)]
    after = [group(i, 40) for i in range(40)]
    overall = decompose_gain(before, after)["overall"]
    assert overall["improvement"]["mean"] == pytest.approx(0)
    assert (
        overall["selection"]["mean"] == pytest.approx(gain(before, after))
        and gain(before, after) > 0.1
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_parts_add_up_exactly(seed):
    """They do in every group, for any responses, and with strategies that one side never takes."""
    rng = random.Random(seed)

    def anything(used):
        group = []
        for _ in range(40):
            kind, steps, responses = rng.choice((EVALUATION, INVERSION)), rng.randint(6, 7), []
            for _ in range(3):
                strategy = rng.choice(used)
                right = rng.random() < 0.5
                error = None if right else rng.choice((GUESS, ARITHMETIC, SKIPPED, NO_ANSWER))
                responses.append(
                    response(kind, steps, strategy, strategy == FORWARD, right, error, True)
                )
            group.append(responses)
        return group

    before, after = anything((FORWARD, NONE)), anything((FORWARD, BACKWARD))
    after = [
        [replace(r, kind=b[0].kind, difficulty=b[0].difficulty) for r in a]
        for a, b in zip(after, before)
    ]
    reasons, differences = decompose_gain(before, after, resamples=20), compare(before, after)
    pairs = [(reasons["overall"], differences["overall"])]
    for key in ("by_type", "by_difficulty"):
        assert reasons[key].keys() == differences[key].keys()
        pairs += [(reasons[key][value], differences[key][value]) for value in reasons[key]]
    for parts, difference in pairs:
        mean = {name: part["mean"] for name, part in parts.items()}
        assert mean["gain"] == pytest.approx(difference["pass@1"])
        assert mean["selection"] + mean["improvement"] == pytest.approx(mean["gain"])
        assert sum(mean[cause] for cause in CAUSES) == pytest.approx(mean["improvement"])
        assert all(
            parts[name]["ci95"][0] <= parts[name]["ci95"][1] for name in parts if name != "gain"
        )


def test_a_strategy_that_one_side_never_takes_counts_as_selection():
    before, after = sample(0.0, 1.0), sample(1.0, 0.9, seed=1)
    overall = decompose_gain(before, after)["overall"]
    assert overall["improvement"]["mean"] == pytest.approx(0)
    assert overall["selection"]["mean"] == pytest.approx(gain(before, after))


def test_a_wrong_guess_is_the_only_cause_of_its_failure():
    """Both models always guess wrong, so no cause contributes to a gain."""
    before, after = sample(0.0, 1.0, 0.0, n=40), sample(0.0, 1.0, 0.0, n=40, seed=1)
    overall = decompose_gain(before, after)["overall"]
    assert all(overall[name]["mean"] == 0 for name in ("gain", "improvement", *CAUSES))


def test_groups_and_causes():
    before, after = sample(0.5, 0.6, cause=SKIPPED), sample(1.0, 1.0, seed=1)
    reasons = decompose_gain(before, after)
    assert set(reasons["by_type"]) == {EVALUATION, INVERSION}
    assert list(reasons["by_difficulty"]) == [f"{n} steps" for n in range(6, 10)]
    mean = np.mean([of["selection"]["mean"] for of in reasons["by_difficulty"].values()])
    assert mean == pytest.approx(reasons["overall"]["selection"]["mean"])
    assert near(reasons["overall"]["procedure"], 0.3) and reasons["overall"]["arithmetic"][
        "mean"
    ] == pytest.approx(0)


def test_what_is_imputed_in_a_resample_comes_from_problems_of_the_same_type():
    """Evaluation is always right, the rest only after: evaluation's mean then has no variance."""

    def of(after: bool) -> list:
        ways = [(FORWARD, BACKWARD)[(i // 2 % 2) ^ after] for i in range(40)]
        kinds = [(EVALUATION, INVERSION)[i % 2] for i in range(40)]
        pairs = zip(kinds, ways)
        return [[response(k, 6, w, w == FORWARD, after or k == EVALUATION)] for k, w in pairs]

    parts = decompose_gain(of(False), of(True))["by_type"][EVALUATION]
    for part in ("selection", "improvement"):
        assert parts[part]["ci95"] == pytest.approx([-1.96 / 20, 1.96 / 20])


def test_fewer_wrong_guesses_are_an_improvement_by_guess():
    parts = decompose_gain(sample(0.0, 1.0, 0.0, n=40), sample(0.0, 1.0, 1.0, n=40))["overall"]
    assert parts["improvement"]["mean"] == parts["guess"]["mean"] == 1
    assert parts["procedure"]["mean"] == parts["arithmetic"]["mean"] == 0


def test_no_interval_goes_beyond_a_gain_of_all():
    before, after = sample(0.0, 1.0, 0.0, n=2), sample(0.0, 1.0, 1.0, n=2)
    assert decompose_gain(before, after)["overall"]["improvement"]["ci95"][1] == 1
