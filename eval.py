"""Evaluate a checkpoint, or two on the same problems, and say why accuracy changed.

    python eval.py                                       # the newest run in ckpt/ beside its start
    python eval.py ckpt/grpo-hard-gf11                   # a run's newest checkpoint alone
    python eval.py ckpt/sft-mixed-gf11 ckpt/forward      # two, on the same problems

pass@1 is the share of sampled responses that are right, averaged over problems; pass@k is the
unbiased estimate of Chen et al. (arXiv 2107.03374, equation 1). Intervals are 95%, over problems:
Wilson's for a pass rate, which is conservative for several samples a problem; for a paired
difference Bonett and Price's (2012) adjusted interval, non-zero even if every problem changes by
the same amount; for the parts of the gain a bootstrap. paper/README.md explains the split.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np

from data import load_problems
from lib.checkpoint import choose_dtype, load_meta, load_model, read_config
from lib.distributed import World, distributed
from lib.flags import (
    parse_flags,
    require,
    require_min,
    require_writable,
    user_errors,
    warn,
    write_json,
)
from lib.policy import DTYPES
from lib.responses import NONE, Response, response_rows, show
from lib.run_dir import choose_checkpoints
from lib.stats import contributions, paired_interval, pass_at_k, wilson
from lib.tables import comparison_table, table
from lib.tokenizer import Tokenizer
from rollout import Sampler
from strategies import ARITHMETIC, GUESS, STRATEGIES, lines_of, score_rollout

Scored = list[list[Response]]  # for each problem its responses


@dataclass
class EvalConfig:
    checkpoints: list = field(default_factory=list)  # checkpoints, runs or a folder of runs [ckpt/]
    # Problems
    difficulty: Literal["easy", "hard", "extreme"] = "hard"  # 2-5, 6-9 or 6-15 steps
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 2-3: two or more make a composition
    problems: int = 256  # validation problems
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    data: str = ""  # JSON lines with prompt and answer [those that the checkpoint was trained on]
    answer_pattern: str = ""  # where the answer lies in a response [as in training]
    tagger: str = ""  # FILE.py:function, (row, response) -> the strategy of a response
    # Sampling
    samples: int = 4  # responses to each
    temperature: float = 1.0  # of the sampling
    greedy: bool = False  # always the likeliest token, one response to a problem
    max_new_tokens: int = 0  # longest response [0: the longest solution's; with --data as trained]
    seed: int = 0  # of the problems and of the sampling
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: as in training, or measured
    # Output
    json: str = ""  # write the metrics to this file
    plot: str = ""  # draw accuracy and strategies to this PNG
    show: int = 0  # print the responses to so many problems


def evaluate(sampler: Sampler, tokenizer: Tokenizer, problems: list, seed: int) -> Scored:
    """Sample and score a group of responses to each problem."""
    if not problems:
        return []
    keys = [(seed, "evaluation sampling", i) for i in range(len(problems))]
    with user_errors():  # a prompt too long for the model
        rollout = sampler.sample([tokenizer.prompt(problem) for problem in problems], keys)
    score_rollout(rollout, problems, tokenizer)
    return rollout.scored


# ------------------------------------------------------------------------------------------------
# Metrics


def strategies_of(responses: list[Response]) -> list[str]:
    """Return the paper's strategies, or the labels that the responses to other problems have."""
    if responses[0].matches is not None:
        return list(STRATEGIES)
    return sorted({r.strategy for r in responses} - {NONE})


def pass_rate(responses: list[Response]) -> float:
    return fmean(r.correct for r in responses)


def accuracy(responses: list[Response]) -> float | None:
    """Return the share of right responses; None if there is no response."""
    return pass_rate(responses) if responses else None


def metrics_of(scored: Scored) -> dict:
    """Return all metrics of some problems' responses."""
    responses = [r for group in scored for r in group]
    samples, mean = len(scored[0]), fmean(map(pass_rate, scored))
    metrics = {"pass@1": mean, "ci95": wilson(mean, len(scored)), "problems": len(scored)}
    metrics["samples"] = samples
    right = [sum(r.correct for r in group) for group in scored]
    for k in (2**i for i in range(1, samples.bit_length())):
        metrics[f"pass@{k}"] = fmean(pass_at_k(samples, c, k) for c in right)
    strategies = Counter(r.strategy for r in responses)
    metrics |= {f"{s}_share": strategies[s] / len(responses) for s in strategies_of(responses)}
    matching = [r for r in responses if r.matches]
    has_match = responses[0].matches is not None
    metrics["match_rate"] = len(matching) / len(responses) if has_match else None
    metrics["accuracy_given_match"] = accuracy(matching)
    metrics["frac_stopped"] = fmean(r.stopped for r in responses)
    metrics["errors"] = dict(Counter(r.error for r in responses if r.error))
    return metrics


def group_by(scored: Scored, key: str) -> dict[str, Scored]:
    """Group problems by an attribute that all responses to one share, sorted; skip empty ones."""
    values = sorted({getattr(group[0], key) for group in scored} - {""}, key=by_number)
    return {v: [group for group in scored if getattr(group[0], key) == v] for v in values}


def by_number(text: str) -> list:
    """Return a key by which "9 steps" comes before "10 steps"."""
    words = re.split(r"([0-9]+)", text)  # text and numbers in turn
    return [int(word) if i % 2 else word for i, word in enumerate(words)]


def summarise(scored: Scored) -> dict:
    """Return metrics overall, by type, by difficulty, by both, and accuracy by strategy."""
    by_strategy = {}
    for strategy in strategies_of([r for group in scored for r in group]):
        if taken := [r for group in scored for r in group if r.strategy == strategy]:
            by_strategy[strategy] = {"responses": len(taken), "accuracy": pass_rate(taken)}

    def metrics_by(key: str, some: Scored) -> dict:
        return {value: metrics_of(groups) for value, groups in group_by(some, key).items()}

    by_type = group_by(scored, "kind")
    return {
        "overall": metrics_of(scored),
        "by_type": metrics_by("kind", scored),
        "by_difficulty": metrics_by("difficulty", scored),
        "by_both": {kind: metrics_by("difficulty", groups) for kind, groups in by_type.items()},
        "by_strategy": by_strategy,
    }


def rollout_metrics(scored: Scored) -> dict[str, float | None]:
    """Return what an update's log says of its responses: reward, accuracy, strategies by type."""
    responses = [r for group in scored for r in group]
    overall, strategies = metrics_of(scored), strategies_of(responses)
    metrics = {"reward": fmean(r.reward for r in responses), "accuracy": overall["pass@1"]}
    metrics["frac_truncated"] = fmean(not r.stopped for r in responses)
    metrics |= {f"{strategy}/all": overall[f"{strategy}_share"] for strategy in strategies}
    for kind, groups in group_by(scored, "kind").items():
        of_kind = metrics_of(groups)
        metrics[f"accuracy/{kind}"] = of_kind["pass@1"]
        for key in ("accuracy_given_match", "match_rate"):
            metrics[f"{key}/{kind}"] = of_kind[key]
        for strategy in strategies:
            taken = [r for group in groups for r in group if r.strategy == strategy]
            metrics[f"{strategy}/{kind}"] = of_kind.get(f"{strategy}_share", 0.0)
            metrics[f"accuracy_given_{strategy}/{kind}"] = accuracy(taken)
    for difficulty, groups in group_by(scored, "difficulty").items():
        metrics[f"accuracy_at/{difficulty}"] = metrics_of(groups)["pass@1"]
    return metrics


def validation_metrics(scored: Scored) -> dict[str, float]:
    """Return what an update's log says of an evaluation."""
    by_type = group_by(scored, "kind").items()
    return {f"validation/{kind}": metrics_of(groups)["pass@1"] for kind, groups in by_type}


def paired_difference(before: Scored, after: Scored) -> dict:
    """Return the change of pass@1 on the same problems, with its interval."""
    changes = [pass_rate(b) - pass_rate(a) for a, b in zip(before, after, strict=True)]
    interval = paired_interval(changes)
    return {"pass@1": fmean(changes), "ci95": interval, "problems": len(changes)}


def compare(before: Scored, after: Scored) -> dict:
    """Return paired differences overall, by type and by difficulty."""
    differences: dict = {"overall": paired_difference(before, after)}
    for name, key in (("by_type", "kind"), ("by_difficulty", "difficulty")):
        a, b = group_by(before, key), group_by(after, key)
        differences[name] = {value: paired_difference(a[value], b[value]) for value in a}
    return differences


# ------------------------------------------------------------------------------------------------
# Why accuracy changed: selection among strategies, or improvement at executing them

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

    lib/stats.py has the formula. Improvement is split by what a wrong response fails by first.
    Intervals are bootstrapped over problems; accuracies are re-imputed in every resample.
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


def report(scored: dict[str, Scored], json: Path | None, plot: Path | None) -> str:
    """Write and draw one checkpoint's metrics, or two and why they differ; return their table."""
    summaries, reasons = [summarise(of_one) for of_one in scored.values()], None
    if len(scored) == 1:
        named, metrics = {"": summaries[0]}, summaries[0]
        text = table(metrics)
    else:
        reasons, difference = decompose_gain(*scored.values()), compare(*scored.values())
        named = dict(zip(("before", "after"), summaries))
        metrics = named | {"difference": difference, "reasons": reasons}
        text = comparison_table(*summaries, difference, reasons, CAUSES)
    if json:
        with user_errors():
            write_json(json, {"checkpoints": list(scored), **metrics})
    if plot:
        from lib.plots import plot_evaluation  # matplotlib takes a second to import

        plot_evaluation(named, plot, reasons)
    return text


def report_run(heading: str, scored: dict[str, Scored], folder: Path, log: list[dict]) -> None:
    """Write, draw and print a GRPO run's start and end; draw its course."""
    from lib.plots import plot_training  # matplotlib takes a second to import

    text = report(scored, folder / "evaluation.json", folder / "evaluation.png")
    plot_training({folder.name: log}, folder / "training.png")
    print(f"\n{heading}\n{text}\n\ncheckpoint  {[*scored][-1]}\nlog, plots  {folder}")


def main(config: EvalConfig, world: World) -> None:
    if not world.is_master:  # under torchrun one process does it all
        return
    require_min(config, problems=1, samples=1, max_new_tokens=0, show=0)
    sane = 1e-3 <= config.temperature <= 1e3
    require(sane, "--temperature must lie between 0.001 and 1000, or use --greedy")
    require_writable(config.json, config.plot)
    paths = choose_checkpoints(config.checkpoints)
    metas = [meta for meta in map(load_meta, paths) if "field" in meta]  # of those made here
    fields = [(meta["field"], meta.get("relabel", "fixed")) for meta in metas] or [(11, "fixed")]
    message = "the two checkpoints were trained on different fields or namings"
    newest, wanted = metas[-1] if metas else {}, config.max_new_tokens
    template = not (config.no_chat_template or newest.get("no_chat_template"))
    trained_on = newest.get("data", "")
    if not config.data and trained_on:
        require(Path(trained_on).exists(), f"{trained_on}, its problems, is gone: say --data")
    config.data = config.data or trained_on
    if config.data:
        if newest.get("tagger") and not config.tagger:
            warn(f"trained with --tagger {newest['tagger']}: without it all responses are alike")
        config.answer_pattern = config.answer_pattern or newest.get("answer_pattern", "")
        wanted = wanted or newest.get("max_new_tokens") or 0
    require(bool(config.data) or fields[0] == fields[-1], message)
    task, problems = load_problems(config, config.problems, *fields[0])
    samples, temperature = (1, 0.0) if config.greedy else (config.samples, config.temperature)

    def score_checkpoint(path: Path) -> Scored:
        one = World(0, 1, world.device)
        precision = choose_dtype(config.precision, read_config(path), path, one)
        model, tokenizer = load_model(path, world.device, DTYPES[precision], template)
        if tokenizer.word_level or not config.data:
            tokenizer.require_vocabulary(task.words)
        limits = (model.config.max_position_embeddings, wanted)
        budget = tokenizer.max_response_tokens(task, *limits, problems)
        sampler = Sampler(model, tokenizer.stops, samples, budget, temperature)
        return evaluate(sampler, tokenizer, problems, config.seed)

    scored = {str(path): score_checkpoint(path) for path in paths}  # one model in memory at a time
    how = "greedy" if config.greedy else f"{samples} samples each at temperature {temperature}"
    which = f"{len(problems)} validation {task.about}"
    text = report(scored, config.json and Path(config.json), config.plot and Path(config.plot))
    print(f"{' -> '.join(scored)}: {which}, {how}; in %\n\n{text}")
    for name, groups in scored.items() if config.show else ():
        rows = response_rows(problems[: config.show], groups, split="validation")
        print(f"\n{name}\n\n" + "\n".join(show(rows, lines_of)))


if __name__ == "__main__":
    config = parse_flags(EvalConfig, __doc__, positional="checkpoints")
    with distributed() as world:
        main(config, world)
