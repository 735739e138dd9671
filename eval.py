"""Evaluate a checkpoint, or two on the same problems, and say why accuracy changed.

    python eval.py                                       # the newest run in ckpt/ beside its start
    python eval.py ckpt/grpo-hard-gf11                   # a run's newest checkpoint alone
    python eval.py ckpt/sft-mixed-gf11 ckpt/forward      # two, on the same problems
    python eval.py --samples 256 --problems 128 --plot curves.png    # pass@k to 256
    python eval.py --force both      # accuracy of each strategy, whatever the policy prefers

pass@1 is the share of responses that are right, averaged over problems; pass@k is the unbiased
estimate of Chen et al. (arXiv 2107.03374, equation 1); verified@k counts the right ones without a
wrong line or a guess. Intervals are 95%, over problems: Wilson's for a pass rate, conservative for
several samples a problem; Bonett and Price's (2012) for a paired difference; those of the
reasons for a gain: lib/gain.py, and of --force: lib/openings.py.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Literal

from data import load_problems
from data.finite_field import WRITTEN, Problem
from lib import openings
from lib.checkpoint import choose_dtype, load_meta, load_model, read_config
from lib.distributed import World, distributed
from lib.flags import (
    parse_flags,
    require,
    require_min,
    require_writable,
    user_errors,
    write_json,
)
from lib.gain import compare, decompose_gain, right_counts
from lib.policy import DTYPES
from lib.responses import NONE, Response, Scored, accuracy, group_by, response_rows, show
from lib.run_dir import choose_checkpoints, inherit_flags
from lib.stats import pass_at_k, wilson
from lib.tables import comparison_table, openings_table, table
from lib.tokenizer import Tokenizer
from lib.training import ProgressBar
from rollout import Sampler
from strategies import STRATEGIES, lines_of, score_rollout

AT_ONCE = 8192  # responses that are sampled and scored in a call


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
    # Interventions
    force: Literal["none", "forward", "backward", "both"] = "none"  # strategies to open with
    given: int = 0  # parts of a composition whose faultless solution stands before the response
    # Output
    json: str = ""  # write the metrics to this file
    plot: str = ""  # draw accuracy and strategies to this PNG
    show: int = 0  # print the responses to so many problems


Policy = tuple[Sampler, Tokenizer]


def evaluate(
    sampler: Sampler,
    tokenizer: Tokenizer,
    problems: list,
    seed: int,
    bar: ProgressBar | None = None,
    stream: str = "evaluation sampling",
    numbers: Sequence[int] | None = None,
) -> Scored:
    """Sample and score a group of responses to each problem; `bar` counts them.

    Random numbers are keyed by seed, stream and the problem's number (None: 0, 1, ...).
    """
    scored, numbers = [], range(len(problems)) if numbers is None else numbers
    n = max(1, AT_ONCE // sampler.group_size)
    for first in range(0, len(problems), n):
        some = problems[first : first + n]
        keys = [(seed, stream, i) for i in numbers[first : first + n]]
        with user_errors():  # a prompt too long for the model
            rollout = sampler.sample([tokenizer.prompt(problem) for problem in some], keys)
        score_rollout(rollout, some, tokenizer)
        scored += rollout.scored
        if bar is not None:
            bar.update(len(some) * sampler.group_size)
    return scored


def force(sampler, tokenizer, problems: dict, seed, strategy, given=0, bar=None) -> dict:
    """Sample responses that open with a strategy behind `given` parts; return them by problem.

    Opening and response together take no more tokens than a free response.
    """
    opened = {i: replace(x, prefix=x.make_prefix(given, strategy)) for i, x in problems.items()}
    added = [len(tokenizer.prefix(opened[i])) - len(tokenizer.prefix(problems[i])) for i in opened]
    most, sampler = sampler.max_new_tokens - max(added, default=0), copy(sampler)
    sampler.max_new_tokens, sampler.batch = max(1, most), None
    stream = f"evaluation sampling {strategy}"
    scored = evaluate(sampler, tokenizer, [*opened.values()], seed, bar, stream, [*opened])
    return dict(zip(opened, scored))


@dataclass(frozen=True)
class Evaluation:
    """What a policy did on validation problems."""

    free: Scored  # its responses
    forced: Scored  # those in strategies that it lacks and the other policy takes
    measured: openings.Openings | None  # with --force


def evaluate_policies(
    policies: dict[str, Callable[[], Policy]],
    problems: list,
    seed: int,
    strategies: Sequence[str] = (),
    given: int = 0,
    bar: ProgressBar | None = None,
) -> dict[str, Evaluation]:
    """Evaluate one policy, or two with the forced responses that lib/gain.py needs; return by name.

    `strategies` are also forced on all problems, after `given` solved parts, for lib/openings.py.
    """
    free, evaluations = {}, {}
    for i, (name, load) in enumerate(policies.items()):  # of each its own: lib/gain.py says why
        free[name] = evaluate(*load(), problems, seed, bar, f"evaluation sampling{' again' * i}")
    for name, mine in free.items():
        theirs = next((scored for other, scored in free.items() if other != name), mine)
        missing = {s: lacking(problems, mine, theirs, s) for s in WRITTEN}  # numbers of problems
        to_force = missing | dict.fromkeys(strategies, range(len(problems)))
        forced: Scored = [[] for _ in problems]  # responses in the strategies that are missing
        answers, sampler = {}, None  # the latter frees the other policy first
        if any(to_force.values()):
            sampler, tokenizer = policies[name]()  # again: one at a time is in memory
            for s, numbers in to_force.items():
                some = {i: problems[i] for i in numbers}
                counted = bar if s in strategies else None
                answers[s] = force(sampler, tokenizer, some, seed, s, given, counted)
                for i in missing[s]:
                    forced[i] += [r for r in answers[s][i] if r.strategy == s]
        of_all = {s: [*answers[s].values()] for s in strategies}
        measured = openings.measure(problems, mine, of_all, given) if strategies else None
        evaluations[name] = Evaluation(mine, forced, measured)
    return evaluations


def lacking(problems: list, mine: Scored, theirs: Scored, strategy: str) -> list[int]:
    """Return the numbers of problems on which `theirs` take a strategy and `mine` do not.

    None of compositions and of user-defined tasks, whose strategies have no opening.
    """
    if not all(isinstance(x, Problem) and len(x.parts) == 1 for x in problems):
        return []
    taken = ([{r.strategy for r in group} for group in scored] for scored in (mine, theirs))
    return [i for i, (a, b) in enumerate(zip(*taken)) if strategy in b - a]


# ------------------------------------------------------------------------------------------------
# Metrics


def strategies_of(responses: list[Response]) -> list[str]:
    """Return the paper's strategies, or the labels that the responses to other problems have."""
    if responses[0].matches is not None:
        return list(STRATEGIES)
    return sorted({r.strategy for r in responses} - {NONE})


def metrics_of(scored: Scored) -> dict:
    """Return all metrics of some problems' responses."""
    responses = [r for group in scored for r in group]
    metrics: dict = {"problems": len(scored), "samples": len(scored[0]), "intervals": {}}
    for what, counts in right_counts(scored).items():
        for k in (2**i for i in range(metrics["samples"].bit_length())):
            mean = fmean(pass_at_k(metrics["samples"], right, k) for right in counts)
            metrics[f"{what}@{k}"] = mean
            metrics["intervals"][f"{what}@{k}"] = wilson(mean, len(scored))
    metrics["ci95"] = metrics["intervals"]["pass@1"]
    strategies = Counter(r.strategy for r in responses)
    metrics |= {f"{s}_share": strategies[s] / len(responses) for s in strategies_of(responses)}
    matching = [r for r in responses if r.matches]
    has_match = responses[0].matches is not None
    metrics["match_rate"] = len(matching) / len(responses) if has_match else None
    metrics["accuracy_given_match"] = accuracy(matching)
    metrics["errors"] = dict(Counter(r.error for r in responses if r.error))
    return metrics


def summarise(scored: Scored) -> dict:
    """Return metrics overall, by type, by difficulty, by both, and accuracy by strategy."""
    by_strategy = {}
    for strategy in strategies_of([r for group in scored for r in group]):
        if taken := [r for group in scored for r in group if r.strategy == strategy]:
            by_strategy[strategy] = {"responses": len(taken), "accuracy": accuracy(taken)}

    def metrics_by(key: str, some: Scored) -> dict:
        return {value: metrics_of(groups) for value, groups in group_by(some, key).items()}

    return {
        "overall": metrics_of(scored),
        "by_type": metrics_by("kind", scored),
        "by_difficulty": metrics_by("difficulty", scored),
        "by_both": {k: metrics_by("difficulty", x) for k, x in group_by(scored, "kind").items()},
        "by_strategy": by_strategy,
    }


def rollout_metrics(scored: Scored) -> dict[str, float | None]:
    """Return what an update's log says of its responses: reward, accuracy, strategies by type."""
    responses = [r for group in scored for r in group]
    overall, strategies = metrics_of(scored), strategies_of(responses)
    metrics = {"reward": fmean(r.reward for r in responses), "accuracy": overall["pass@1"]}
    metrics["verified"] = overall.get("verified@1")
    metrics["frac_truncated"] = fmean(not r.stopped for r in responses)
    metrics |= {f"{strategy}/all": overall[f"{strategy}_share"] for strategy in strategies}
    for kind, groups in group_by(scored, "kind").items():
        of_kind = metrics_of(groups)
        metrics[f"accuracy/{kind}"] = of_kind["pass@1"]
        metrics[f"verified/{kind}"] = of_kind.get("verified@1")
        for key in ("accuracy_given_match", "match_rate"):
            metrics[f"{key}/{kind}"] = of_kind[key]
        for strategy in strategies:
            taken = [r for group in groups for r in group if r.strategy == strategy]
            metrics[f"{strategy}/{kind}"] = of_kind.get(f"{strategy}_share", 0.0)
            metrics[f"accuracy_given_{strategy}/{kind}"] = accuracy(taken)
    for difficulty, groups in group_by(scored, "difficulty").items():
        metrics[f"accuracy_at/{difficulty}"] = metrics_of(groups)["pass@1"]
    return metrics


def validation_metrics(policy: Policy, problems: list, seed: int) -> dict[str, float]:
    """Evaluate a policy, and return what an update's log says of it."""
    by_type = group_by(evaluate(*policy, problems, seed), "kind").items()
    return {f"validation/{kind}": metrics_of(groups)["pass@1"] for kind, groups in by_type}


# ------------------------------------------------------------------------------------------------
# The command


def report(evaluations: dict[str, Evaluation], json: Path | str, plot: Path | str) -> str:
    """Write and draw one checkpoint's metrics, or two and why they differ; return their table."""
    scored = [of_one.free for of_one in evaluations.values()]
    summaries = [summarise(of_one) for of_one in scored]
    if len(scored) == 1:
        named, metrics = {"": summaries[0]}, summaries[0]
        text = table(metrics)
    else:
        named = dict(zip(("before", "after"), summaries))
        imputed, forced = decompose_gain(*scored), [x.forced for x in evaluations.values()]
        reasons = decompose_gain(*scored, forced) if any(map(any, forced)) else imputed
        metrics = named | {"difference": compare(*scored), "reasons": reasons, "imputed": imputed}
        text = comparison_table(metrics)
    if measured := [of_one.measured for of_one in evaluations.values() if of_one.measured]:
        metrics = metrics | openings.compare(dict(zip(named, measured)))
        text += f"\n\n{openings_table(metrics)}"
    if json:
        with user_errors():
            write_json(Path(json), {"checkpoints": list(evaluations), **metrics})
    if plot:
        from lib.plots import plot_evaluation  # matplotlib takes a second to import

        plot_evaluation(named, plot, metrics)
    return text


def report_run(how: str, evaluations: dict, folder: Path, log: list[dict]) -> None:
    """Report a GRPO run's end beside its start, if that is still there, and plot its course."""
    from lib.plots import plot_training  # matplotlib takes a second to import

    text = report(evaluations, folder / "evaluation.json", folder / "evaluation.png")
    plot_training({folder.name: log}, folder / "training.png")
    heading = "before -> " * (len(evaluations) > 1) + f"after RL, {how}"
    print(f"\n{heading}\n{text}\n\ncheckpoint  {[*evaluations][-1]}\nlog, plots  {folder}")


def main(config: EvalConfig, world: World) -> None:
    if not world.is_master:  # under torchrun one process does it all
        return
    require_min(config, problems=1, samples=1, max_new_tokens=0, show=0, given=0)
    sane = config.greedy or 1e-3 <= config.temperature <= 1e3
    require(sane, "--temperature must lie between 0.001 and 1000, or use --greedy")
    require_writable(config.json, config.plot)
    paths = choose_checkpoints(config.checkpoints)
    metas = [meta for meta in map(load_meta, paths) if "field" in meta]  # of those made here
    fields = [(meta["field"], meta.get("relabel", "fixed")) for meta in metas] or [(11, "fixed")]
    inherit_flags(config, metas[-1] if metas else {})
    alike = bool(config.data) or fields[0] == fields[-1]
    require(alike, "the two checkpoints were trained on different fields or namings")
    task, problems = load_problems(config, config.problems, *fields[0])
    strategies = {"none": [], "both": WRITTEN}.get(config.force, [config.force])
    if given := config.given:
        enough = all(given < len(problem.parts) for problem in problems)
        require(enough, f"--given {given} needs problems of at least {given + 1} --parts")
        problems = [replace(problem, prefix=problem.make_prefix(given)) for problem in problems]
    samples, temperature = (1, 0.0) if config.greedy else (config.samples, config.temperature)

    one = World(0, 1, world.device)
    precisions = {x: choose_dtype(config.precision, read_config(x), x, one) for x in paths}

    def load(path: Path) -> Policy:
        how = DTYPES[precisions[path]], not config.no_chat_template
        model, tokenizer = load_model(path, world.device, *how)
        if tokenizer.word_level or not config.data:
            tokenizer.require_vocabulary(task.words)
        model.requires_grad_(False)  # so that the CPU keeps its weights in oneDNN's layout
        limits = (model.config.max_position_embeddings, config.max_new_tokens)
        budget = tokenizer.max_response_tokens(task, *limits, problems)
        return Sampler(model, tokenizer.stops, samples, budget, temperature), tokenizer

    policies = {str(path): partial(load, path) for path in paths}
    total = len(paths) * (1 + len(strategies)) * len(problems) * samples
    with ProgressBar(total=total, desc="sampling", disable=total <= AT_ONCE) as bar:
        evaluations = evaluate_policies(policies, problems, config.seed, strategies, given, bar)
    how = "greedy" if config.greedy else f"{samples} samples each at temperature {temperature}"
    which = f"{len(problems)} validation {task.about}" + f", parts given: {given}" * (given > 0)
    text = report(evaluations, config.json, config.plot)
    print(f"{' -> '.join(evaluations)}: {which}, {how}; in %\n\n{text}")
    for name, of_one in evaluations.items() if config.show else ():
        rows = response_rows(problems[: config.show], of_one.free, split="validation")
        print(f"\n{name}\n\n" + "\n".join(show(rows, lines_of)))


if __name__ == "__main__":
    config = parse_flags(EvalConfig, __doc__, positional="checkpoints")
    with distributed() as world:
        main(config, world)
