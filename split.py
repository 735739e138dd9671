"""Why accuracy changed: by selecting among strategies, or by improving at carrying them out.

On a problem x a policy takes the strategy s with probability pi(s|x) and is then right with probability acc(s, x), so
that its accuracy is the sum of pi acc over the strategies. Between two policies, on the same problem, exactly

    gain = sum_s (pi' - pi) (acc + acc') / 2         selection:   strategies are taken more or less often
         + sum_s (pi + pi') / 2 (acc' - acc)         improvement: strategies succeed more or less often

This is the decomposition of Kitagawa (1955) and of Oaxaca and Blinder (1973) in its symmetric form, in which neither
policy is the base; it is also the Shapley value of the two changes. Improvement is split further by what makes a
response wrong: 1 - acc is the sum, over three causes, of the chance that a response fails by it first,

    arithmetic   a step names the right operation and operands, and a wrong result
    procedure    a step is skipped, out of order or done with something else; the response does not end, or not so
    guess        what the strategy had to guess, because it does not fit, is not so

What it cannot say. It is arithmetic on outcomes and not a cause: RL did not work on selection and improvement one after
the other, and a strategy that became better may be taken more often for that reason. "Strategy" is what the tagger can
tell apart: what happens within one counts as improvement.

What it assumes. How well a strategy does on a problem is not known where no response took it there. It is given the
accuracy it has on the problems of the same type and number of steps, else on those of the same type, and where a policy
never takes it on these either, the accuracy it has under the other policy, so that all it brings counts as selection.
The sum of the parts is the gain whatever is put there; but where a policy takes a strategy rather on problems that
suit it, the strategy looks better than it would be on the others, and what selection brings comes out too small or too
large by that. More responses to a problem (eval.py --samples) need less of it.

Intervals are bootstrapped over problems, and accuracies are put in anew in every resample: a strategy that was rarely
taken makes them wide. Of one that was taken a few times in all, they hold the truth 85 to 90 times in 100 instead of 95
(tests/test_split.py); of what was never seen to happen, a bootstrap cannot say how often it might. That of the gain is
in eval.py's paired difference.
"""

import numpy as np

from strategies import ARITHMETIC, GUESS, Response

CAUSES = ("arithmetic", "procedure", "guess")
OUTCOMES = ("right", *CAUSES)
Judged = list[list[Response]]  # of each problem, its responses


def outcome(response: Response) -> str:
    if response.correct:
        return "right"
    return {ARITHMETIC: "arithmetic", GUESS: "guess"}.get(response.error, "procedure")


def count(judged: Judged, strategies: list[tuple[str, bool]]) -> np.ndarray:
    """How often each strategy came to each outcome on each problem: (X, S, 4)."""
    counts = np.zeros((len(judged), len(strategies), len(OUTCOMES)))
    for x, responses in enumerate(judged):
        for r in responses:
            counts[x, strategies.index((r.strategy, r.fits)), OUTCOMES.index(outcome(r))] += 1
    return counts


def rates(counts: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """How often a strategy comes to each outcome, (X, S, 4), from counts (X, S, 4).

    Where it was not taken on a problem, its rates are those of the problem's first cell in which it was (each of
    `cells` numbers the problems' cells, (X,)); NaN where there is none.
    """
    with np.errstate(invalid="ignore"):
        found = counts / counts.sum(2, keepdims=True)
        for cell in cells:
            totals = np.zeros((cell.max() + 1, *counts.shape[1:]))
            np.add.at(totals, cell, counts)
            found = np.where(np.isnan(found), (totals / totals.sum(2, keepdims=True))[cell], found)
    return found


def contributions(before: np.ndarray, after: np.ndarray, cells: list[np.ndarray]) -> np.ndarray:
    """What selection and each cause of improvement bring on each problem, (4, X), from counts (X, S, 4).

    They add up to the problem's gain; improvement is the sum of the causes.
    """
    share, share_after = (counts.sum(2) / counts.sum((1, 2))[:, None] for counts in (before, after))  # (X, S)
    rate, rate_after = rates(before, cells), rates(after, cells)
    rate, rate_after = (np.nan_to_num(np.where(np.isnan(a), b, a)) for a, b in ((rate, rate_after), (rate_after, rate)))
    selection = ((share_after - share) * (rate + rate_after)[:, :, 0] / 2).sum(1)
    fewer = ((share + share_after)[:, :, None] / 2 * (rate - rate_after)).sum(1)  # (X, 4) of each outcome
    return np.stack((selection, *fewer[:, 1:].T))


def explain(before: Judged, after: Judged, resamples: int = 1000) -> dict:
    """The gain in pass@1 and its parts, with 95% intervals: overall, by type and by number of steps."""
    strategies = sorted({(r.strategy, r.fits) for judged in (before, after) for group in judged for r in group})
    counts = [count(judged, strategies) for judged in (before, after)]
    kinds, steps = ([str(getattr(group[0], key)) for group in before] for key in ("kind", "steps"))
    cells = [np.unique(names, return_inverse=True)[1] for names in ([*map(" ".join, zip(kinds, steps))], kinds)]

    groups = {("overall", ""): np.ones(len(before))}  # 1 for the problems of a group, (X,)
    for name, values, order in (("by_type", kinds, str), ("by_steps", steps, int)):
        groups |= {(name, value): np.array(values) == value for value in sorted(set(values), key=order)}
    members = np.array(list(groups.values()), dtype=float)  # (groups, X)

    def means(chosen: np.ndarray) -> np.ndarray:
        """Of each group and each part, from the chosen problems: (groups, 4); NaN for a group of none."""
        parts = contributions(*(c[chosen] for c in counts), [cell[chosen] for cell in cells])
        with np.errstate(invalid="ignore"):
            return members[:, chosen] @ parts.T / members[:, chosen].sum(1, keepdims=True)

    def with_sums(parts: np.ndarray) -> np.ndarray:
        """(..., 4) -> gain, selection, improvement and the causes, (..., 6)"""
        return np.stack((parts.sum(-1), parts[..., 0], parts[..., 1:].sum(-1), *np.moveaxis(parts[..., 1:], -1, 0)), -1)

    found = with_sums(means(np.arange(len(before))))
    draws = np.random.default_rng(0).integers(0, len(before), (resamples, len(before)))
    intervals = np.nanpercentile(with_sums(np.array([means(chosen) for chosen in draws])), [2.5, 97.5], axis=0)

    result: dict = {"overall": {}, "by_type": {}, "by_steps": {}}
    for i, (name, value) in enumerate(groups):
        figures: dict = {"gain": {"mean": float(found[i, 0])}}
        for j, part in enumerate(("selection", "improvement", *CAUSES), 1):
            figures[part] = {"mean": float(found[i, j]), "ci95": intervals[:, i, j].tolist()}
        result[name] = figures if name == "overall" else result[name] | {value: figures}
    return result
