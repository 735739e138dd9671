"""Evaluate one checkpoint, or two on the same problems.

    python eval.py runs/grpo-hard-gf11                          # the run's newest checkpoint
    python eval.py runs/sft-mixed-gf11 runs/grpo-hard-gf11      # side by side, and why accuracy changed: split.py

pass@1 is the share of sampled responses that are right, averaged over problems; pass@k is the unbiased estimate of
Chen et al. (arXiv 2107.03374, equation 1). Intervals are 95% over problems: Wilson's for a pass rate, which is
conservative when there are several samples a problem, and for a paired difference the adjusted normal one of Bonett and
Price (2012), which has a width also where all problems change alike.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, pstdev
from typing import Literal

from checkpoint import choose_precision, load_model, load_training, read_config
from data.finite_field import BACKWARD, FORWARD, Problem, Task
from model import PRECISIONS, ModelConfig, Transformer
from packed import describe
from rollout import Sampler
from run_folder import find_checkpoint
from runtime import World, at_least, check_outputs, parse_flags, processes, refusals, require, stream, write_json
from split import CAUSES, explain
from strategies import STRATEGIES, Response, judge
from tokenizer import Tokenizer


@dataclass
class EvalConfig:
    checkpoints: list = field(default_factory=list)  # one or two checkpoints, run folders or names on the hub
    difficulty: Literal["easy", "hard", "extreme"] = "hard"  # easy (2-5 steps), hard (6-9) or extreme (6-15)
    steps: str = ""  # such as 3-7, instead of --difficulty
    parts: str = "1"  # parts of a problem, such as 2-3: two or more make a composition
    problems: int = 256  # validation problems
    samples: int = 4  # responses to each
    temperature: float = 1.0  # of the sampling
    greedy: bool = False  # the likeliest token always, one response a problem
    seed: int = 0  # of the problems and of the sampling
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # of the computation; auto: as in training, or measured
    no_chat_template: bool = False  # prompts as plain text, though the model has a chat template
    json: str = ""  # write the figures to this file
    plot: str = ""  # draw accuracy and strategies to this PNG


def token_budget(shape: ModelConfig, tokenizer: Tokenizer, task: Task, wanted: int = 0) -> int:
    """Tokens of a response: as many as `wanted`, or where that is 0 the longest solution of the task and a line more.

    Refuses a model with too few positions for them.
    """
    rng, longest = stream("token budget"), task.longest()
    problems = [longest.sample(rng, "train") for _ in range(64)]
    solutions = [problem.solution(strategy) for problem in problems for strategy in (FORWARD, BACKWARD)]
    lines = [line for solution in solutions[:2] for line in solution.split("\n")]
    sizes = [max(len(tokenizer.solution(text)) - 1 for text in texts) for texts in (solutions, lines)]
    prompt = max(len(tokenizer.prompt(problem)) for problem in problems)
    limit = shape.max_position_embeddings
    budget = wanted or sum(sizes)
    require(
        prompt + budget <= limit, f"prompts and responses take {prompt + budget} tokens, the model {limit} positions"
    )
    return budget


def judge_groups(problems: list[Problem], texts: list[str], stopped: list[bool]) -> list[list[Response]]:
    """Judge a rollout's responses: those to each problem follow one another."""
    group = len(texts) // len(problems)
    judged = [judge(problems[i // group], text, stopped[i]) for i, text in enumerate(texts)]
    return [judged[i : i + group] for i in range(0, len(judged), group)]


def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    problems: list[Problem],
    max_new_tokens: int,
    samples: int,
    temperature: float,
    seed: int,
) -> list[list[Response]]:
    """Sample and judge `samples` responses of at most `max_new_tokens` tokens to each problem."""
    sampler = Sampler(model, tokenizer.stops, samples, max_new_tokens, temperature)
    prompts = [tokenizer.prompt(problem) for problem in problems]
    rollout = sampler.sample(prompts, [(seed, "evaluation sampling", i) for i in range(len(prompts))])
    return judge_groups(problems, tokenizer.decode(rollout.responses()), rollout.stopped.tolist())


def validation_problems(task: Task, n: int, seed: int) -> list[Problem]:
    """n distinct validation problems; of a task that has fewer, all or nearly all."""
    rng, chosen, repeated = stream(seed, "validation problems"), {}, 0
    while len(chosen) < n and repeated < 300:  # in a row
        problem = task.sample(rng, "validation")
        known = chosen.setdefault((problem.field, problem.parts), problem)
        repeated = 0 if known is problem else repeated + 1
    return list(chosen.values())


# ------------------------------------------------------------------------------------------------------------------
# Figures


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n responses, c of them right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def wilson(mean: float, n: int, z: float = 1.96) -> list[float]:
    """Wilson's score interval of a rate over n problems."""
    centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def pass_rate(responses: list[Response]) -> float:
    return fmean(r.correct for r in responses)


def cell(judged: list[list[Response]]) -> dict:
    """The figures of some problems' responses."""
    responses = [r for group in judged for r in group]
    samples = len(judged[0])
    strategies = Counter(r.strategy for r in responses)
    fitting = [r.correct for r in responses if r.fits]
    mean = fmean(map(pass_rate, judged))
    figures = {"pass@1": mean, "ci95": wilson(mean, len(judged)), "problems": len(judged), "samples": samples}
    for k in (2**i for i in range(1, samples.bit_length())):
        figures[f"pass@{k}"] = fmean(pass_at_k(samples, sum(r.correct for r in group), k) for group in judged)
    for strategy in STRATEGIES:
        figures[f"{strategy}_share"] = strategies[strategy] / len(responses)
    figures["fit_share"] = len(fitting) / len(responses)
    figures["accuracy_given_fit"] = fmean(fitting) if fitting else None
    figures["stopped_share"] = fmean(r.stopped for r in responses)
    figures["errors"] = dict(Counter(r.error for r in responses if r.error))
    return figures


def group_by(judged: list[list[Response]], key: str) -> dict[str, list[list[Response]]]:
    """Problems by an attribute that all responses to one share, sorted."""
    values = sorted({getattr(group[0], key) for group in judged})
    return {str(value): [group for group in judged if getattr(group[0], key) == value] for value in values}


def summarise(judged: list[list[Response]]) -> dict:
    """All figures: overall, by type, by number of steps, by both, and by strategy (of responses, not problems)."""
    by_strategy = {}
    for strategy in STRATEGIES:
        correct = [r.correct for group in judged for r in group if r.strategy == strategy]
        if correct:
            by_strategy[strategy] = {"responses": len(correct), "accuracy": fmean(correct)}
    by_type = group_by(judged, "kind")
    return {
        "overall": cell(judged),
        "by_type": {kind: cell(groups) for kind, groups in by_type.items()},
        "by_steps": {steps: cell(groups) for steps, groups in group_by(judged, "steps").items()},
        "by_type_and_steps": {
            kind: {steps: cell(some) for steps, some in group_by(groups, "steps").items()}
            for kind, groups in by_type.items()
        },
        "by_strategy": by_strategy,
    }


def behaviour(judged: list[list[Response]]) -> dict[str, float | None]:
    """What an update's responses did: accuracy, also given the strategy, and strategy shares by problem type."""
    logged = {"accuracy": "pass@1", "accuracy_given_fit": "accuracy_given_fit", "fit_share": "fit_share"}
    everything = cell(judged)
    figures = {f"{strategy}/all": everything[f"{strategy}_share"] for strategy in STRATEGIES}
    for kind, groups in group_by(judged, "kind").items():
        c = cell(groups)
        figures |= {f"{name}/{kind}": c[key] for name, key in logged.items()}
        for strategy in STRATEGIES:
            right = [r.correct for group in groups for r in group if r.strategy == strategy]
            figures[f"{strategy}/{kind}"] = c[f"{strategy}_share"]
            figures[f"accuracy_given_{strategy}/{kind}"] = fmean(right) if right else None
    steps = group_by(judged, "steps")
    return figures | {f"accuracy_at_steps/{n}": cell(groups)["pass@1"] for n, groups in steps.items()}


def paired_difference(before: list[list[Response]], after: list[list[Response]]) -> dict:
    """Change of pass@1 on the same problems, with its 95% interval."""
    changes = [pass_rate(b) - pass_rate(a) for a, b in zip(before, after, strict=True)]
    adjusted = [*changes, 1.0, -1.0]  # as if on one problem more all was gained and on one all lost
    centre, half = fmean(adjusted), 1.96 * pstdev(adjusted) / math.sqrt(len(adjusted))
    interval = [max(-1.0, centre - half), min(1.0, centre + half)]
    return {"pass@1": fmean(changes), "ci95": interval, "problems": len(changes)}


def compare(before: list[list[Response]], after: list[list[Response]]) -> dict:
    """Paired differences overall, by type and by number of steps."""
    differences: dict = {"overall": paired_difference(before, after)}
    for name, key in (("by_type", "kind"), ("by_steps", "steps")):
        a, b = group_by(before, key), group_by(after, key)
        differences[name] = {value: paired_difference(a[value], b[value]) for value in a}
    return differences


# ------------------------------------------------------------------------------------------------------------------
# Tables


def rows_of(summary: dict) -> list[tuple[str, dict]]:
    steps = [(f"{n} step{'s' * (n != '1')}", c) for n, c in summary["by_steps"].items()]
    return [("all", summary["overall"]), *summary["by_type"].items(), *steps]


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def signed(figure: dict, key: str = "mean") -> str:
    """A change and its interval, in percent."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * x for x in (figure[key], *figure["ci95"])))


def table(summaries: dict[str, dict], difference: dict | None = None, reasons: dict | None = None) -> str:
    """The figures of checkpoints, in percent, as text."""
    top = max(int(key[5:]) for key in next(iter(summaries.values()))["overall"] if key.startswith("pass@"))
    ks = [1] if top == 1 else [1, top]
    head = [*(f"pass@{k}" for k in ks), "95% interval", "forward", "backward", "fitting", "right if fit", "problems"]
    text = ""
    for name, summary in summaries.items():
        text += f"\n{name}\n{'':14}" + "".join(f"{word:>14}" for word in head) + "\n"
        for row, c in rows_of(summary):
            figures = [percent(c[f"pass@{k}"]) for k in ks] + ["{} - {}".format(*map(percent, c["ci95"]))]
            figures += [
                percent(c[key]) for key in ("forward_share", "backward_share", "fit_share", "accuracy_given_fit")
            ]
            text += f"{row:14}" + "".join(f"{x:>14}" for x in [*figures, str(c["problems"])]) + "\n"
    if difference:
        text += "\nchange of pass@1, paired by problem\n"
        for row, c in rows_of(difference):
            text += f"{row:14}{signed(c, 'pass@1'):>26}\n"
    if reasons:
        text += "\nwhy: the gain is selection + improvement; improvement is of arithmetic, procedure and guesses\n"
        text += f"{'':14}{'selection':>26}{'improvement':>26}" + "".join(f"{cause:>12}" for cause in CAUSES) + "\n"
        for row, c in rows_of(reasons):
            text += f"{row:14}{signed(c['selection']):>26}{signed(c['improvement']):>26}"
            text += "".join(f"{100 * c[cause]['mean']:>+12.1f}" for cause in CAUSES) + "\n"
    return text


def report(judged: dict[str, list[list[Response]]], json: Path | None, plot: Path | None) -> None:
    """Print the figures of one checkpoint, or of two and why they differ; write and draw them where that is asked."""
    summaries = [summarise(groups) for groups in judged.values()]
    figures, reasons = summaries[0], None
    named, heads = {"": figures}, list(judged)
    if len(judged) == 2:
        named = dict(zip(("before", "after"), summaries))
        heads = [f"{when}: {name}" for when, name in zip(named, judged)]
        reasons = explain(*judged.values())
        figures = named | {"difference": compare(*judged.values()), "reasons": reasons}
    print(table(dict(zip(heads, summaries)), figures.get("difference"), reasons))
    if json:
        with refusals():
            write_json(json, {"checkpoints": list(judged), **figures})
    if plot:
        from plot import plot_evaluation  # matplotlib, which takes a second, only where a plot is asked for

        plot_evaluation(named, plot, reasons)


# ------------------------------------------------------------------------------------------------------------------


def check(config: EvalConfig) -> None:
    require(1 <= len(config.checkpoints) <= 2, "name one checkpoint, or two to compare")
    at_least(config, problems=1, samples=1)
    require(
        0 < config.temperature < math.inf, "--temperature must be above 0; for the likeliest tokens there is --greedy"
    )
    check_outputs(config.json, config.plot)


def main(config: EvalConfig, world: World) -> None:
    if not world.leads:  # under torchrun one process does it all
        return
    check(config)
    paths = [find_checkpoint(name) for name in config.checkpoints]
    require(len({path.resolve() for path in paths}) == len(paths), f"both names mean the checkpoint {paths[0]}")
    made_here = [training for training in map(load_training, paths) if "field" in training]
    fields = [(training["field"], training.get("relabel", "fixed")) for training in made_here] or [(11, "fixed")]
    require(fields[0] == fields[-1], "the two checkpoints were trained on different fields or namings")
    with refusals():
        task = Task.from_flags(config.difficulty, config.steps, *fields[0], config.parts)
        problems = validation_problems(task, config.problems, config.seed)
    samples, temperature = (1, 0.0) if config.greedy else (config.samples, config.temperature)

    def judge_checkpoint(path: Path) -> list[list[Response]]:
        precision = choose_precision(config.precision, read_config(path), path, World(0, 1, world.device))
        model, tokenizer = load_model(path, world.device, PRECISIONS[precision], not config.no_chat_template)
        tokenizer.check(task.p)
        print(describe(model))
        budget = token_budget(model.config, tokenizer, task)
        return evaluate(model, tokenizer, problems, budget, samples, temperature, config.seed)

    judged = {str(path): judge_checkpoint(path) for path in paths}  # one model at a time in memory
    low, high = task.steps
    how = "greedy" if config.greedy else f"{samples} samples each at temperature {temperature}"
    print(f"{len(problems)} validation problems of {low}-{high} steps in GF({task.p}), {how}; figures in %")
    report(judged, config.json and Path(config.json), config.plot and Path(config.plot))


if __name__ == "__main__":
    config = parse_flags(EvalConfig, __doc__, positional="checkpoints")
    with processes() as world:
        main(config, world)
