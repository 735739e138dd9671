"""Forced openings: what a policy could do with each strategy, whatever it prefers.

A solution's first words say its strategy ("start", "end", "guess start", "guess end"). A policy
writes from left to right, so to put these words before its response is to ask what it does after
saying them:

    access     the share of free responses that open with a strategy
    execution  the accuracy of responses that must open with it
    faultless  the share of these without a wrong line: a wrong guess may be carried through well

Accuracy is access times execution, summed over the strategies, and what responses that open
otherwise get right. To split a gain, lib/gain.py has strategies forced, too.

Arrays are (X, S) for X problems and S strategies.
"""

import math
from dataclasses import dataclass

import numpy as np

from lib.responses import Scored
from lib.stats import mean_interval

PARTS = {  # and their headings
    "access": "opens this way",
    "execution": "right if forced",
    "faultless": "no wrong line",
}
# What mean_interval adds, and the least value: for a share a problem with none and one with all,
# for a change the variance of one problem that gains all or loses all.
LEVEL, CHANGE = ((0.0, 1.0), 0.0), ((math.sqrt(0.5), -math.sqrt(0.5)), -1.0)


@dataclass(frozen=True)
class Openings:
    """What one policy does on each problem."""

    strategies: list[str]  # S that were forced
    kinds: list[str]  # X types of the part that is opened
    access: np.ndarray  # (X, S)
    execution: np.ndarray  # (X, S)
    faultless: np.ndarray  # (X, S)


def measure(problems: list, free: Scored, forced: dict[str, Scored], given: int = 0) -> Openings:
    """Return a policy's openings of the part behind the `given` ones of each problem.

    free: for each problem the responses to it
    forced: by strategy, for each problem the responses that had to open with it
    """

    def rates(what: str) -> np.ndarray:
        """Return the share of a problem's forced responses of which this holds, (X, S)."""
        columns = []
        for scored in forced.values():
            columns.append([np.mean([getattr(r, what) for r in group]) for group in scored])
        return np.stack(columns, 1)

    kinds, access = [problem.parts[given].kind for problem in problems], []
    for problem, group in zip(problems, free, strict=True):
        opened = [problem.opening_strategy(r.response, given) for r in group]  # "" for neither
        access.append([opened.count(strategy) / len(opened) for strategy in forced])
    return Openings([*forced], kinds, np.array(access), rates("correct"), rates("faultless"))


def summarise(openings: Openings, before: Openings | None = None) -> dict:
    """Return the means of all parts, or what they gained since `before`, by type and strategy."""
    summary: dict = {}
    for kind in sorted(set(openings.kinds)):
        chosen = np.array(openings.kinds) == kind  # (X,)
        summary[kind] = {strategy: {} for strategy in openings.strategies}
        for part in PARTS:
            values, bounds = getattr(openings, part), LEVEL
            if before:
                values, bounds = values - getattr(before, part), CHANGE
            for i, strategy in enumerate(openings.strategies):
                mean, interval = values[chosen, i].mean(), mean_interval(values[chosen, i], *bounds)
                summary[kind][strategy][part] = {"mean": float(mean), "ci95": interval}
    return summary


def compare(named: dict[str, Openings]) -> dict:
    """Return what one policy does, or two, by name, and what has changed."""
    result: dict = {"openings": {name: summarise(of_one) for name, of_one in named.items()}}
    if len(named) == 2:
        before, after = named.values()
        result["openings_change"] = summarise(after, before)
    return result
