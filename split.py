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
    guess        everything is carried out rightly from a wrong guess (a strategy that does not fit)

What it cannot say. It is arithmetic on outcomes and not a cause: RL did not work on selection and improvement one after
the other, and a strategy that became better may be taken more often for that reason. A strategy that one policy never
takes has no accuracy there; it is taken to be the other policy's, so that all it brings counts as selection. "Strategy"
is what the tagger can tell apart: what happens within one counts as improvement.
"""

from collections.abc import Callable

import numpy as np

from strategies import ARITHMETIC, Response

CAUSES = ("arithmetic", "procedure", "guess")
OUTCOMES = ("right", *CAUSES)
Judged = list[list[Response]]  # of each problem, its responses


def outcome(response: Response) -> str:
    if response.correct:
        return "right"
    if response.error is None:
        return "guess"
    return "arithmetic" if response.error == ARITHMETIC else "procedure"


def count(judged: Judged, strategies: list[tuple[str, bool]]) -> np.ndarray:
    """How often each strategy came to each outcome on each problem: (X, S, 4)."""
    counts = np.zeros((len(judged), len(strategies), len(OUTCOMES)))
    for x, responses in enumerate(judged):
        for r in responses:
            counts[x, strategies.index((r.strategy, r.fits)), OUTCOMES.index(outcome(r))] += 1
    return counts


def rates(counts: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """How often a strategy comes to each outcome, (X, S, 4): on the problem itself; where the strategy was not taken
    there, on all problems of its kind (X,); NaN where it was not taken on those either."""
    with np.errstate(invalid="ignore"):
        found = counts / counts.sum(2, keepdims=True)
        for kind in np.unique(kinds):
            same = kinds == kind
            total = counts[same].sum(0)
            found[same] = np.where(np.isnan(found[same]), total / total.sum(1, keepdims=True), found[same])
    return found


def contributions(before: Judged, after: Judged) -> dict[str, np.ndarray]:
    """What selection and each kind of improvement bring on each problem, (X,) each; they add up to its gain."""
    strategies = sorted({(r.strategy, r.fits) for judged in (before, after) for group in judged for r in group})
    kinds = np.unique([f"{group[0].kind} {group[0].steps}" for group in before], return_inverse=True)[1]
    counts = [count(judged, strategies) for judged in (before, after)]
    share, share_after = (c.sum(2) / c.sum((1, 2))[:, None] for c in counts)  # (X, S)
    rate, rate_after = (rates(c, kinds) for c in counts)
    rate, rate_after = (np.nan_to_num(np.where(np.isnan(a), b, a)) for a, b in ((rate, rate_after), (rate_after, rate)))
    selection = ((share_after - share) * (rate + rate_after)[:, :, 0] / 2).sum(1)
    fewer = ((share + share_after)[:, :, None] / 2 * (rate - rate_after)).sum(1)  # (X, 4) of each outcome
    parts = {cause: fewer[:, OUTCOMES.index(cause)] for cause in CAUSES}
    return {"selection": selection, "improvement": -fewer[:, 0], **parts}


def interval(values: np.ndarray, seed: int = 0, resamples: int = 2000) -> list[float]:
    """95% bootstrap interval of the mean over problems (X,): the percentiles of resampled means."""
    chosen = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    return np.percentile(values[chosen].mean(1), [2.5, 97.5]).tolist()


def explain(before: Judged, after: Judged) -> dict:
    """The gain in pass@1 and its parts, with 95% intervals: overall, by type and by number of steps."""
    parts = contributions(before, after)

    def figures(same: np.ndarray) -> dict:
        gain = (parts["selection"] + parts["improvement"])[same]
        return {
            name: {"mean": float(values.mean()), "ci95": interval(values)}
            for name, values in {"gain": gain, **{name: values[same] for name, values in parts.items()}}.items()
        }

    def by(key: Callable[[Response], object]) -> dict[str, dict]:
        values = np.array([key(group[0]) for group in before])
        return {str(value): figures(values == value) for value in np.unique(values)}

    everything = np.ones(len(before), dtype=bool)
    return {"overall": figures(everything), "by_type": by(lambda r: r.kind), "by_steps": by(lambda r: r.steps)}
