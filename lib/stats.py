"""Statistics of evaluations: pass@k, intervals, and the split of a gain into two causes.

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

import math
from statistics import fmean, pstdev

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n responses, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """Return Wilson's score interval of a rate over n problems."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def paired_interval(changes: list[float], z: float = 1.96) -> list[float]:
    """Return Bonett and Price's (2012) adjusted interval of a mean change, paired by problem."""
    adjusted = [*changes, 1.0, -1.0]  # as if one more problem gained all, and one lost all
    centre, half = fmean(adjusted), z * pstdev(adjusted) / math.sqrt(len(adjusted))
    return [max(-1.0, centre - half), min(1.0, centre + half)]


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
