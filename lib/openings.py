"""Forced openings: what a policy could do with each strategy, whatever it prefers.

A solution's first words say its strategy ("start", "end", "guess end"). A policy writes from left
to right, so to put these words before its response is to ask what it does after saying them:

    access     the share of free responses that open with a strategy
    execution  the accuracy of responses that must open with it
    faultless  the share of these without a wrong line: a wrong guess may be carried through well

Accuracy is access times execution, summed over the strategies, and what responses that open
otherwise get right. So a gain can be split by what each strategy achieves on every problem,
measured before and after, where lib/gain.py has to guess the accuracy of a strategy that a
problem's responses did not take. Free and forced responses are sampled apart, so the errors of
access and execution do not depend on each other, and the parts are right on average.

Arrays are (X, S) for X problems and S strategies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lib.responses import Scored
from lib.stats import mean_interval

PARTS = {  # and their headings
    "access": "opens this way",
    "execution": "right if forced",
    "faultless": "no wrong line",
}


@dataclass(frozen=True)
class Openings:
    """What one policy does on each problem."""

    strategies: list[str]  # S that were forced
    kinds: list[str]  # X types of the part that is opened
    access: np.ndarray  # (X, S)
    execution: np.ndarray  # (X, S)
    faultless: np.ndarray  # (X, S)
    right_otherwise: np.ndarray  # (X,) the share of free responses that open otherwise, but right

    def groups(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield the name and the problems of all problems together, and of each type."""
        kinds = np.array(self.kinds)
        yield "all", np.ones(len(kinds), dtype=bool)
        yield from ((kind, kinds == kind) for kind in sorted(set(self.kinds)))


def measure(kinds: list[str], opened: list, free: Scored, forced: dict[str, Scored]) -> Openings:
    """Return the openings of a policy.

    opened: for each problem the strategy with which each of its `free` responses opens, or ""
    forced: by strategy, for each problem the responses that had to open with it
    """

    def rates(scored: Scored, what: str) -> np.ndarray:
        return np.array([np.mean([getattr(r, what) for r in group]) for group in scored])

    def otherwise(words: list, group: list) -> float:
        return np.mean([r.correct and word not in forced for word, r in zip(words, group)])

    access = [[words.count(strategy) / len(words) for strategy in forced] for words in opened]
    execution, faultless = (
        np.stack([rates(scored, what) for scored in forced.values()], 1)
        for what in ("correct", "faultless")
    )
    rest = np.array([otherwise(*of_problem) for of_problem in zip(opened, free, strict=True)])
    return Openings([*forced], kinds, np.array(access), execution, faultless, rest)


def summarise(openings: Openings, before: Openings | None = None) -> dict:
    """Return the means of all parts, or what they gained since `before`, by type and strategy."""
    summary: dict = {}
    for name, chosen in openings.groups():
        summary[name] = {strategy: {} for strategy in openings.strategies}
        for part in PARTS:
            values, describe = getattr(openings, part), level
            if before:
                values, describe = values - getattr(before, part), change
            for i, strategy in enumerate(openings.strategies):
                summary[name][strategy][part] = describe(values[chosen, i])
    return summary


def compare(named: dict[str, Openings]) -> dict:
    """Return what one policy does, or two, by name, what has changed, and the split of the gain."""
    result: dict = {"openings": {name: summarise(of_one) for name, of_one in named.items()}}
    if len(named) == 2:
        before, after = named.values()
        result["openings_change"] = summarise(after, before)
        if len(before.strategies) == 2:
            result["measured_split"] = split(before, after)
    return result


def level(values: np.ndarray) -> dict:
    return {"mean": float(values.mean()), "ci95": mean_interval(values, (0.0, 1.0), 0.0)}


def change(values: np.ndarray) -> dict:
    """Return a mean change; its interval is as if one more problem had gained all, or lost all."""
    added = (math.sqrt(0.5), -math.sqrt(0.5))
    return {"mean": float(values.mean()), "ci95": mean_interval(values, added, -1.0)}


def split(before: Openings, after: Openings) -> dict:
    """Return selection and improvement from measured accuracies, by type.

    By convention all that responses which open otherwise bring counts as selection, and, where a
    problem has several parts, strategies in the parts behind the opened one as improvement. The sum
    differs from the gain of free responses by the noise of both samples.
    """
    execution = (before.execution + after.execution) / 2
    selection = ((after.access - before.access) * execution).sum(1)  # (X,)
    selection += after.right_otherwise - before.right_otherwise
    access = (before.access + after.access) / 2
    improvement = (access * (after.execution - before.execution)).sum(1)
    parts = {"selection": selection, "improvement": improvement}
    return {
        name: {part: change(values[chosen]) for part, values in parts.items()}
        for name, chosen in before.groups()
    }
