"""Statistics of evaluations: pass@k and intervals over problems."""

import math

import numpy as np


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the chance that k of n responses, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> list[float]:
    """Return Wilson's score interval of a rate over n problems."""
    z = 1.96
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mean_interval(values, added: tuple[float, float], low: float) -> list[float]:
    """Return an interval, within `low` and 1, of the mean of problems' values (n,).

    It is the normal one after two more values are `added`, as by Agresti and Caffo (2000): so it
    has a width even if all problems are alike.
    """
    adjusted = np.append(values, added)
    centre, half = adjusted.mean(), 1.96 * adjusted.std() / math.sqrt(len(adjusted))
    return [max(low, float(centre - half)), min(1.0, float(centre + half))]
