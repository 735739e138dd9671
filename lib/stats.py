"""Statistics of evaluations: pass@k, intervals, and the split of a gain into two causes.

On a problem x a policy takes strategy s with probability pi(s|x) and is then right with probability
acc(s, x). Between two policies, on the same problem, exactly

    gain = sum_s (pi' - pi) (acc + acc') / 2      selection:   strategies are taken more or less
         + sum_s (pi + pi') / 2 (acc' - acc)      improvement: they succeed more or less often

This is the decomposition of Kitagawa (1955) and of Oaxaca and Blinder (1973) in symmetric form, in
which neither policy is the base; it is the Shapley value of the two changes. It is arithmetic on
outcomes, not a cause: a strategy that became better may be taken more often for that reason.

How well a strategy does on a problem is unknown where no response took it there. Its accuracy is
imputed from similar problems; where a policy never takes it, from the other policy, so that all it
brings counts as selection. The parts add up to the gain whatever is imputed; but a policy that
takes a strategy mainly on problems that suit it makes the strategy look better than it is on the
others, and selection comes out too small or too large by that. More samples need less of it.

A strategy that was rarely taken makes bootstrapped intervals wide. If it was taken a few times in
all, they hold the truth 85 to 90 times in 100, not 95 (tests/test_decompose_gain.py); of what was
never seen to happen, a bootstrap cannot say how often it might.
"""

import math
from statistics import fmean, pstdev

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n responses, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """Return Wilson's score interval of a rate over n problems."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    spread = math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    half = z / (1 + z * z / n) * spread
    return [max(0.0, centre - half), min(1.0, centre + half)]


def paired_interval(changes: list[float], z: float = 1.96) -> list[float]:
    """Return Bonett and Price's (2012) adjusted interval of a mean change, paired by problem."""
    adjusted = [*changes, 1.0, -1.0]  # as if one more problem gained all, and one lost all
    centre, half = fmean(adjusted), z * pstdev(adjusted) / math.sqrt(len(adjusted))
    return [max(-1.0, centre - half), min(1.0, centre + half)]


def outcome_rates(counts: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """Return how often a strategy comes to each outcome, (X, S, 4), from counts (X, S, 4).

    Where it was not taken on a problem, its rates are imputed from the problem's first cell in
    which it was: each of `cells` numbers the problems' cells, (X,). NaN where there is none.
    """
    with np.errstate(invalid="ignore"):
        rates = counts / counts.sum(2, keepdims=True)
        for cell in cells:
            totals = np.zeros((cell.max() + 1, *counts.shape[1:]))
            np.add.at(totals, cell, counts)
            imputed = (totals / totals.sum(2, keepdims=True))[cell]
            rates = np.where(np.isnan(rates), imputed, rates)
    return rates


def contributions(before: np.ndarray, after: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """Return what selection and each cause bring on each problem, (4, X), from counts (X, S, 4).

    They add up to the problem's gain; improvement is the sum of the causes. A strategy that one
    policy never takes has the rates of the other: all it brings counts as selection.
    """
    share, share_after = (c.sum(2) / c.sum((1, 2))[:, None] for c in (before, after))  # (X, S)
    a, b = outcome_rates(before, cells), outcome_rates(after, cells)
    rate = np.nan_to_num(np.where(np.isnan(a), b, a))
    rate_after = np.nan_to_num(np.where(np.isnan(b), a, b))
    accuracy = (rate + rate_after)[:, :, 0] / 2
    selection = ((share_after - share) * accuracy).sum(1)
    taken = (share + share_after)[:, :, None] / 2
    fewer = (taken * (rate - rate_after)).sum(1)  # (X, 4): how much rarer each outcome became
    return np.stack((selection, *fewer[:, 1:].T))
