"""How and why accuracy changed: a gain in pass@1, split into selection and improvement.

On a problem x a policy takes strategy s with probability pi(s|x) and is then right with probability
acc(s, x). Between two policies, on the same problem, exactly

    gain = sum_s (pi' - pi) (acc + acc') / 2      selection:   strategies are taken more or less
         + sum_s (pi + pi') / 2 (acc' - acc)      improvement: they succeed more or less often

For acc of a strategy that a policy took on none of a problem's responses, but the other policy did,
eval.py forces it where it can. Where it cannot, acc is imputed from similar problems, or, where a
policy never does it, from the other policy, so that all it brings counts as selection. What the
split means, its sources, and how far intervals hold: paper/README.md, "Why accuracy changed".

eval.py samples each policy with random numbers of its own. Shared ones misled the split where one
token decides both the strategy and whether it succeeds: by up to 5 points for SmolLM2's sums.
"""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from lib.responses import ARITHMETIC, GUESS, NONE, Scored, accuracy, by_number, group_by
from lib.stats import mean_interval

CAUSES = ("arithmetic", "procedure", "guess")
OUTCOMES = ("right", *CAUSES)


def right_counts(scored: Scored) -> dict[str, list[int]]:
    """Return how many responses to each problem are right, and of the paper's task verified."""
    counts = {"pass": [sum(r.correct for r in group) for group in scored]}
    if scored[0][0].matches is not None:
        counts["verified"] = [sum(r.verified for r in group) for group in scored]
    return counts


def paired_difference(before: Scored, after: Scored) -> dict:
    """Return the change of pass@1 on the same problems, with Bonett and Price's (2012) interval."""
    changes = [accuracy(b) - accuracy(a) for a, b in zip(before, after, strict=True)]
    interval = mean_interval(changes, (1.0, -1.0), -1.0)  # one more gained all, and one lost all
    return {"pass@1": fmean(changes), "ci95": interval, "problems": len(changes)}


def compare(before: Scored, after: Scored) -> dict:
    """Return paired differences overall, by type and by difficulty.

    `solved` and `lost` count problems with a right response (of the paper's task: a verified one)
    only after, or only before.
    """
    counts = (c.get("verified", c["pass"]) for c in map(right_counts, (before, after)))
    pairs = [(bool(a), bool(b)) for a, b in zip(*counts)]
    found = {"solved": pairs.count((False, True)), "lost": pairs.count((True, False))}
    differences: dict = {"overall": paired_difference(before, after) | found}
    for name, key in (("by_type", "kind"), ("by_difficulty", "difficulty")):
        a, b = group_by(before, key), group_by(after, key)
        differences[name] = {value: paired_difference(a[value], b[value]) for value in a}
    return differences


def count_outcomes(scored: Scored, strategies: list[tuple[str, bool]]) -> np.ndarray:
    """Count how often each strategy came to each outcome on each problem: (X, S, 4)."""
    counts = np.zeros((len(scored), len(strategies), len(OUTCOMES)))
    for x, responses in enumerate(scored):
        for r in responses:
            cause = {ARITHMETIC: "arithmetic", GUESS: "guess"}.get(r.error, "procedure")
            outcome = OUTCOMES.index("right" if r.correct else cause)
            counts[x, strategies.index((r.strategy, r.matches)), outcome] += 1
    return counts


def decompose_gain(
    before: Scored, after: Scored, forced: Sequence[Scored] = (), resamples: int = 300
) -> dict:
    """Split the gain in pass@1 into selection and improvement, overall, by type and difficulty.

    forced: of both policies, for each problem, responses in strategies that no free response took

    Improvement is split by what a wrong response fails by first, which is known of the paper's task
    alone. Of others without labels there is no split: {}. Intervals are normal ones, with variances
    bootstrapped over problems, and imputed anew in each resample; 1/n^2 is added for n problems, as
    if one more had gained or lost all.
    """
    everything = (before, after, *forced)
    strategies = sorted({(r.strategy, r.matches) for s in everything for group in s for r in group})
    if strategies == [(NONE, None)]:
        return {}
    causes = CAUSES if before[0][0].matches is not None else ()
    counts = [count_outcomes(scored, strategies) for scored in everything]
    kinds = [group[0].kind for group in before]
    difficulties = [group[0].difficulty for group in before]
    names = [f"{a} {b}" for a, b in zip(kinds, difficulties)], kinds  # impute by both, then by type
    cells = [np.unique(of_problem, return_inverse=True)[1] for of_problem in names]

    groups = {("overall", ""): np.ones(len(before))}  # 1 for the problems of a group, (X,)
    for name, values in (("by_type", kinds), ("by_difficulty", difficulties)):
        for value in sorted(set(values) - {""}, key=by_number):
            groups[name, value] = np.array(values) == value
    members = np.array(list(groups.values()), dtype=float)  # (groups, X)

    def parts_of(chosen: np.ndarray) -> np.ndarray:
        """Return gain, selection, improvement and its causes of each group: (groups, 6)."""
        parts = contributions([c[chosen] for c in counts], [cell[chosen] for cell in cells])
        with np.errstate(invalid="ignore"):  # NaN for a group without a chosen problem
            parts = members[:, chosen] @ parts.T / members[:, chosen].sum(1, keepdims=True)
        sums = parts.sum(-1), parts[:, 0], parts[:, 1:].sum(-1)
        return np.concatenate((np.stack(sums, -1), parts[:, 1:]), -1)

    means = parts_of(np.arange(len(before)))
    draws = np.random.default_rng(0).integers(0, len(before), (resamples, len(before)))
    resampled = np.array([parts_of(chosen) for chosen in draws])
    variances = np.nanvar(resampled, 0) + 1 / members.sum(1)[:, None] ** 2
    half = 1.96 * np.sqrt(variances)  # (groups, 6)
    intervals = np.stack((means - half, means + half), -1).clip(-1, 1)

    result: dict = {"overall": {}, "by_type": {}, "by_difficulty": {}}
    for i, (name, value) in enumerate(groups):
        parts = result[name].setdefault(value, {}) if value else result[name]
        parts["gain"] = {"mean": float(means[i, 0])}
        for j, part in enumerate(("selection", "improvement", *causes), 1):
            parts[part] = {"mean": float(means[i, j]), "ci95": intervals[i, j].tolist()}
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


def contributions(counts: list[np.ndarray], cells: list[np.ndarray]) -> np.ndarray:
    """Return what selection and each cause of improvement bring to each problem's gain, (4, X).

    counts: before and after, and perhaps those of forced responses before and after, (X, S, 4) each
    """
    share, share_after = (c.sum(2) / c.sum((1, 2))[:, None] for c in counts[:2])  # (X, S)
    known = counts[:2]
    if len(counts) > 2:
        known = [np.where(c.any(2, keepdims=True), c, more) for c, more in zip(known, counts[2:])]
    a, b = (outcome_rates(c, cells) for c in known)
    rate = np.nan_to_num(np.where(np.isnan(a), b, a))  # of one never taken: the other policy's
    rate_after = np.nan_to_num(np.where(np.isnan(b), a, b))
    accuracy = (rate + rate_after)[:, :, 0] / 2
    selection = ((share_after - share) * accuracy).sum(1)
    taken = (share + share_after)[:, :, None] / 2
    fewer = (taken * (rate - rate_after)).sum(1)  # (X, 4): how much rarer each outcome became
    return np.stack((selection, *fewer[:, 1:].T))
