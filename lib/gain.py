"""Why accuracy changed: the split of a gain in pass@1 into selection and improvement.

On a problem x a policy takes strategy s with probability pi(s|x) and is then right with probability
acc(s, x). Between two policies, on the same problem, exactly

    gain = sum_s (pi' - pi) (acc + acc') / 2      selection:   strategies are taken more or less
         + sum_s (pi + pi') / 2 (acc' - acc)      improvement: they succeed more or less often

This is the decomposition of Kitagawa (1955), Oaxaca and Blinder (1973) in symmetric form, which is
the Shapley value of the two changes. It is arithmetic on outcomes, not a cause: a strategy that
became better may be taken more often for that reason.

Where no response to a problem took a strategy, its accuracy is imputed from similar problems; where
a policy never takes it, from the other policy, so that all it brings counts as selection. The parts
add up to the gain whatever is imputed. But a policy that takes a strategy mainly on problems that
suit it makes it look better than it is on the others, which biases selection; more samples help. If
a strategy was taken only a few times in all, bootstrapped intervals hold the truth 85 to 90 times
in 100, not 95 (tests/test_decompose_gain.py).
"""

import numpy as np

from lib.responses import ARITHMETIC, GUESS, Scored, by_number

CAUSES = ("arithmetic", "procedure", "guess")
OUTCOMES = ("right", *CAUSES)


def count_outcomes(scored: Scored, strategies: list[tuple[str, bool]]) -> np.ndarray:
    """Count how often each strategy came to each outcome on each problem: (X, S, 4)."""
    counts = np.zeros((len(scored), len(strategies), len(OUTCOMES)))
    for x, responses in enumerate(scored):
        for r in responses:
            cause = {ARITHMETIC: "arithmetic", GUESS: "guess"}.get(r.error, "procedure")
            outcome = OUTCOMES.index("right" if r.correct else cause)
            counts[x, strategies.index((r.strategy, r.matches)), outcome] += 1
    return counts


def decompose_gain(before: Scored, after: Scored, resamples: int = 1000) -> dict:
    """Split the gain in pass@1 into selection and improvement, overall, by type and difficulty.

    Improvement is split by what a wrong response fails by first. Intervals are bootstrapped over
    problems; accuracies are re-imputed in every resample.
    """
    both = (before, after)
    strategies = sorted({(r.strategy, r.matches) for s in both for group in s for r in group})
    counts = [count_outcomes(scored, strategies) for scored in both]
    kinds = [group[0].kind for group in before]
    difficulties = [group[0].difficulty for group in before]
    names = ([*map(" ".join, zip(kinds, difficulties))], kinds)  # impute by both, then by type
    cells = [np.unique(of_problem, return_inverse=True)[1] for of_problem in names]

    groups = {("overall", ""): np.ones(len(before))}  # 1 for the problems of a group, (X,)
    for name, values in (("by_type", kinds), ("by_difficulty", difficulties)):
        for value in sorted(set(values) - {""}, key=by_number):
            groups[name, value] = np.array(values) == value
    members = np.array(list(groups.values()), dtype=float)  # (groups, X)

    def parts_of(chosen: np.ndarray) -> np.ndarray:
        """Return gain, selection, improvement and its causes of each group: (groups, 6)."""
        parts = contributions(*(c[chosen] for c in counts), [cell[chosen] for cell in cells])
        with np.errstate(invalid="ignore"):  # NaN for a group without a chosen problem
            parts = members[:, chosen] @ parts.T / members[:, chosen].sum(1, keepdims=True)
        sums = parts.sum(-1), parts[:, 0], parts[:, 1:].sum(-1)
        return np.concatenate((np.stack(sums, -1), parts[:, 1:]), -1)

    means = parts_of(np.arange(len(before)))
    draws = np.random.default_rng(0).integers(0, len(before), (resamples, len(before)))
    resampled = np.array([parts_of(chosen) for chosen in draws])
    intervals = np.nanpercentile(resampled, [2.5, 97.5], axis=0)  # (2, groups, 6)

    result: dict = {"overall": {}, "by_type": {}, "by_difficulty": {}}
    for i, (name, value) in enumerate(groups):
        parts = result[name].setdefault(value, {}) if value else result[name]
        parts["gain"] = {"mean": float(means[i, 0])}
        for j, part in enumerate(("selection", "improvement", *CAUSES), 1):
            parts[part] = {"mean": float(means[i, j]), "ci95": intervals[:, i, j].tolist()}
    return result


def outcome_rates(counts: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """Return how often a strategy comes to each outcome, (X, S, 4), from counts (X, S, 4).

    Where a problem has none: of its cell in the first of `cells`, (X,) each, that has any, or NaN.
    """
    with np.errstate(invalid="ignore"):
        rates = counts / counts.sum(2, keepdims=True)
        for cell in cells:
            totals = np.zeros((cell.max() + 1, *counts.shape[1:]))
            np.add.at(totals, cell, counts)
            rates = np.where(np.isnan(rates), (totals / totals.sum(2, keepdims=True))[cell], rates)
    return rates


def contributions(before: np.ndarray, after: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """Return what selection and each cause of improvement bring to each problem's gain, (4, X)."""
    share, share_after = (c.sum(2) / c.sum((1, 2))[:, None] for c in (before, after))  # (X, S)
    a, b = outcome_rates(before, cells), outcome_rates(after, cells)
    rate = np.nan_to_num(np.where(np.isnan(a), b, a))  # of one never taken: the other policy's
    rate_after = np.nan_to_num(np.where(np.isnan(b), a, b))
    accuracy = (rate + rate_after)[:, :, 0] / 2
    selection = ((share_after - share) * accuracy).sum(1)
    taken = (share + share_after)[:, :, None] / 2
    fewer = (taken * (rate - rate_after)).sum(1)  # (X, 4): how much rarer each outcome became
    return np.stack((selection, *fewer[:, 1:].T))
