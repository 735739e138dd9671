"""Reproduce the paper's experiments: run their commands and hold the results against the paper's.

    python -m paper.reproduce --list                # the experiments, and how long they took last
    python -m paper.reproduce table1                # one seed
    python -m paper.reproduce table1 --seeds 3
    python -m paper.reproduce table1 --model models/smollm2
    python -m paper.reproduce table1 --model models/smollm2 --laptop --only FB    # on a laptop

Every number comes from a command that is printed below the table. Finished commands are not run
again, and one that Ctrl-C has interrupted resumes. Commands of the tiny model run side by side on
the CPU, one thread each; those of another have all cores, one after the other. Runs lie in
ckpt/reproduce, results in paper/results/NAME or NAME-MODEL (.json, .md and .png).

Each experiment is a `Plan`. Its cells say what to train and evaluate, and every cell gives one row
of numbers for each seed. The table, the verdicts and the figure are made of these rows.
"""

import math
from collections.abc import Callable
from itertools import product
from statistics import fmean

from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION
from lib.flags import parse_flags, quiet_pipes, read_json, require, require_min
from paper.experiment import MODELS, Cell, Claim, Experiment, Plan, ReproduceConfig, series

TYPES = (EVALUATION, INVERSION)
EASY, HARD, EXTREME = ({"difficulty": name} for name in ("easy", "hard", "extreme"))
MARGIN = 3  # percentage points below which two evaluations count as equal
EXPERIMENTS: dict[str, Plan] = {}


def tenth(log: list[dict], which: str) -> list[dict]:
    """Return the "first tenth" or "last tenth" of a log, rounded up."""
    n = math.ceil(len(log) / 10)
    return log[:n] if which == "first tenth" else log[-n:]


def mean_of(log: list[dict], metric: str) -> float:
    """Return a metric's mean in percent, over the updates that have it."""
    return 100 * fmean(row[metric] for row in log if row.get(metric) is not None)


def grows(least: float = MARGIN) -> Callable[[float, float], bool]:
    return lambda before, after: after - before >= least


def stays(least: float = MARGIN) -> Callable[[float, float], bool]:
    return lambda before, after: after - before < least


def below(limit: float) -> Callable[..., bool]:
    return lambda *found: max(found) < limit


# ------------------------------------------------------------------------------------------------
# Table 1: which model learns what by RL on which problems

STAGES = {"SFT": (HARD, "before"), "RL 2-5": (EASY, "after"), "RL 6-9": (HARD, "after")}
PAPER_TABLE1 = {  # pass@1 on 6-9 steps: all, inversion, evaluation
    "B, SFT": (24.5, 38.9, 11.9),
    "B, RL 2-5": (18.4, 25.6, 10.1),
    "B, RL 6-9": (50.8, 96.0, 11.6),
    "F, SFT": (57.0, 10.7, 97.1),
    "F, RL 2-5": (48.0, 9.3, 91.7),
    "F, RL 6-9": (58.3, 11.0, 99.3),
    "FB, SFT": (47.0, 27.1, 64.3),
    "FB, RL 2-5": (60.0, 32.2, 91.5),
    "FB, RL 6-9": (95.7, 94.1, 97.1),
}


def table1_claims() -> list[Claim]:
    to_easy, to_hard = ("SFT", "RL 2-5"), ("SFT", "RL 6-9")
    nine = [x for model in MODELS for x in series("all", "stage", STAGES, model=model)]
    best = [(kind, kind, {"model": "FB", "stage": "RL 6-9"}) for kind in TYPES]
    claims = [
        Claim("FB with RL on 6-9 steps is the best of the nine (B, F, FB)",
              lambda *found: found[-1] == max(found), nine),
        Claim("and above 90% on both types", lambda *found: min(found) > 90, best),
        Claim("selection: the share of the matching strategy goes from about half to above 95%",
              lambda sft, rl: 35 < sft < 65 and rl > 95,
              series("match_rate", "stage", to_hard, model="FB")),
        Claim("improvement: accuracy given the matching strategy rises by RL on 6-9", grows(5),
              series("accuracy_given_match", "stage", to_hard, model="FB")),
        Claim("and needs harder data: it does not by RL on 2-5", stays(),
              series("accuracy_given_match", "stage", to_easy, model="FB")),
        Claim("FB gains by RL on 2-5", grows(), series("all", "stage", to_easy, model="FB")),
    ]  # fmt: skip
    single = (("F", EVALUATION, INVERSION, BACKWARD), ("B", INVERSION, EVALUATION, FORWARD))
    for model, matching, other, unknown in single:
        claims += [
            Claim(f"{model}: no new strategy, share of {unknown} responses", below(1),
                  series(f"{unknown}_share", "stage", STAGES, model=model)),
            Claim(f"{model}: {other} stays within chance (9%)", below(15),
                  series(other, "stage", STAGES, model=model)),
            Claim(f"{model} improves on {matching} by RL on 6-9", grows(),
                  series(matching, "stage", to_hard, model=model)),
            Claim(f"{model} does not improve on {matching} by RL on 2-5", stays(),
                  series(matching, "stage", to_easy, model=model)),
        ]  # fmt: skip
    return claims


EXPERIMENTS["table1"] = Plan(
    "SFT on backward, forward or both strategies, then RL on 2-5 or 6-9 steps",
    [
        Cell({"model": model, "stage": stage}, model, rl, HARD, side)
        for model in MODELS
        for stage, (rl, side) in STAGES.items()
    ],
    "Pass@1 in % on 6-9 steps, mean and range of the seeds:",
    table1_claims(),
    paper=PAPER_TABLE1,
)


# ------------------------------------------------------------------------------------------------
# Dynamics: the course of RL, from the runs of table 1


def accuracy_in_rl(cell: Cell, log: list[dict]) -> dict[str, float]:
    part = tenth(log, cell.labels["updates"])
    return {kind: mean_of(part, f"accuracy/{kind}") for kind in TYPES}


def course_of_rl() -> dict[str, list]:
    """Return the panels of the figure: accuracy of each model by type, and by number of steps."""
    panels = {}
    for model, data in MODELS.items():
        labels = {"model": model, "updates": "last tenth"}
        of_types = [(kind, f"accuracy/{kind}", labels) for kind in TYPES]
        of_steps = [(f"{n} steps", f"accuracy_at/{n} steps", labels) for n in range(6, 10)]
        panels |= {f"accuracy in RL, SFT on {data}": of_types, f"SFT on {data}": of_steps}
    return panels


def only_fb_above_90(*of_types: float) -> bool:
    b, f, fb = (min(pair) for pair in zip(of_types[:3], of_types[3:]))
    return fb > 90 > 20 > max(b, f)


EXPERIMENTS["dynamics"] = Plan(
    "accuracy in the course of RL, by type and by number of steps (runs of table1)",
    [
        Cell({"model": model, "updates": which}, model, HARD)
        for model in MODELS
        for which in ("first tenth", "last tenth")
    ],
    "Accuracy in RL in %, on its own problems, in the first and the last tenth of the updates:",
    [Claim("only FB approaches 100% on both types (last tenth; evaluation, then inversion)",
           only_fb_above_90,
           [x for kind in TYPES for x in series(kind, "model", MODELS, updates="last tenth")])],
    columns={kind: kind for kind in TYPES},
    measure=accuracy_in_rl,
    curves=course_of_rl(),
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Amplification: RL on more evaluation problems than inversion problems

SHARES = {0.5: {}, 0.75: {"evaluation_share": 0.75}, 0.9: {"evaluation_share": 0.9}}  # RL's flags
LEARNING_TO_CHOOSE = range(16, 26)  # updates in which the tiny model does


def forward_shares(cell: Cell, log: list[dict]) -> dict[str, float]:
    """Return the share of forward responses in RL.

    stream: in the last tenth of the updates
    learning: while RL teaches the choice, if half of the problems had been evaluation
    """
    early = [row for row in log if row["update"] in LEARNING_TO_CHOOSE]
    learning = fmean(mean_of(early, f"{FORWARD}/{kind}") for kind in TYPES)
    stream = mean_of(tenth(log, "last tenth"), f"{FORWARD}/all")
    return {"stream": stream, "learning": learning}


def rises(low: float, middle: float, high: float) -> bool:
    return low + 2 < middle < high - 2


EXPERIMENTS["amplification"] = Plan(
    "RL on 50, 75 and 90% evaluation problems: forward responses follow the data",
    [Cell({"evaluation_share": share}, "FB", HARD | flag, HARD) for share, flag in SHARES.items()],
    "Share of forward responses in %, by the share of evaluation among RL's problems:",
    [
        Claim("the share of forward responses in the RL stream follows the data: 50, 75, 90%",
              lambda *found: all(abs(x - 100 * share) < 6 for x, share in zip(found, SHARES)),
              series("stream", "evaluation_share", SHARES)),
        Claim("and rises with it on balanced validation data, after RL",
              rises, series("forward_share", "evaluation_share", SHARES)),
        Claim("(ours) or at least on the way, while RL teaches the choice",
              rises, series("learning", "evaluation_share", SHARES)),
    ],
    {
        "in the RL stream, last tenth of the updates": "stream",
        "updates 16-25, were the problems 50:50": "learning",
        "validation (50:50), after RL": "forward_share",
    },
    measure=forward_shares,
    curves={"forward responses in RL": series(f"{FORWARD}/all", "evaluation_share", SHARES)},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Composition: RL on more parts than SFT held

SFT_PARTS = {"single parts": {}, "1-2 parts": {"parts": "1-2"}, "1-3 parts": {"parts": "1-3"}}
SIDES = {"SFT": "before", "RL": "after"}
EXPERIMENTS["composition"] = Plan(
    "RL on compositions of 3-5 parts, SFT on single parts, up to two (the paper's) or three",
    [
        Cell({"sft": name, "parts": parts, "stage": stage}, "FB",
             EASY | {"parts": "3-5"}, EASY | {"parts": parts}, side, flags,
             sft_tiny={"updates": 2400})  # compositions take it longer to learn
        for name, flags in SFT_PARTS.items()
        for parts in ("3-5", "4-5")
        for stage, side in SIDES.items()
    ],
    "Compositions: data of SFT, parts of the problems evaluated, stage. In %:",
    [
        Claim("RL learns 3-5 parts if SFT held compositions of two", grows(10),
              series("all", "stage", SIDES, sft="1-2 parts", parts="3-5")),
        Claim("and not if it held none", stays(5),
              series("all", "stage", SIDES, sft="single parts", parts="3-5")),
        Claim("(ours) a weaker form: it learns 4-5 parts if SFT held up to three", grows(10),
              series("all", "stage", SIDES, sft="1-3 parts", parts="4-5")),
    ],
    {
        "pass@1": "all",
        "every part takes the matching strategy": "match_rate",
        "SFT's accuracy given the matching strategy, on its own data": "sft_accuracy_given_match",
    },
    curves={"reward on 3-5 parts": series("reward", "sft", SFT_PARTS, parts="3-5", stage="RL")},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Another field, longer problems, other settings of RL

GF13_STAGES = {"SFT, on 2-5": (EASY, "before"), "SFT": (HARD, "before"), "RL 6-9": (HARD, "after")}
FIELD = {"field": 13}
EXPERIMENTS["gf13"] = Plan(
    "the three SFT models in GF(13), then RL on 6-9 steps",
    [
        Cell({"model": model, "stage": stage}, model, HARD | FIELD, evaluation, side, FIELD)
        for model in MODELS
        for stage, (evaluation, side) in GF13_STAGES.items()
    ],
    "Pass@1 in % in GF(13), on 6-9 steps but where it says 2-5:",
    [
        Claim("all three SFT models reach 70-80% on 2-5 steps",
              lambda *found: all(70 <= x <= 80 for x in found),
              series("all", "model", MODELS, stage="SFT, on 2-5")),
        Claim("(ours) the three are alike there, within five points",
              lambda *found: max(found) - min(found) < 5,
              series("all", "model", MODELS, stage="SFT, on 2-5")),
        Claim("after RL on 6-9 steps only FB is near perfect",
              lambda b, f, fb: fb > 90 > 70 > max(b, f),
              series("all", "model", MODELS, stage="RL 6-9")),
    ],
)  # fmt: skip


EXTREME_SIDES = {"SFT": "before", "RL 6-15": "after"}
EXPERIMENTS["extreme"] = Plan(
    "FB reinforced on 6-15 steps",
    [Cell({"stage": stage}, "FB", EXTREME, EXTREME, side) for stage, side in EXTREME_SIDES.items()],
    "Pass@1 in % on 6-15 steps:",
    [Claim("FB still improves clearly on 6-15 steps", grows(10),
           series("all", "stage", EXTREME_SIDES))],
    by_steps=tuple(EXTREME_SIDES),
)  # fmt: skip

SETTINGS = {  # flags, and the paper's final accuracy of B, F and FB
    "default": ({}, (53, 60, 97)),
    "beta 0.1": ({"beta": 0.1}, (53, 58, 96)),
    "group 16": ({"group_size": 16}, (58, 51, 98)),
    "group 16, beta 0.1": ({"group_size": 16, "beta": 0.1}, (53, 52, 97)),
}
EXPERIMENTS["robustness"] = Plan(
    "other KL weights and group sizes: the final accuracy of B, F and FB on 6-9 steps",
    [
        Cell({"rl": name, "model": model}, model, HARD | flags, HARD)
        for name, (flags, _) in SETTINGS.items()
        for model in MODELS
    ],
    "Pass@1 in % on 6-9 steps, after RL:",
    [
        Claim(f"FB is far ahead of B and F, by 20 points or more: {name}",
              lambda b, f, fb: fb - max(b, f) >= 20, series("all", "model", MODELS, rl=name))
        for name in SETTINGS
    ],
    {"all": "all"},
    paper={f"{name}, {model}": (number,)
           for name, (_, numbers) in SETTINGS.items() for model, number in zip(MODELS, numbers)},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------
# Losses that people compare: our question, not the paper's

LOSSES = {  # flags of train_grpo.py, with the clipping bounds of each publication
    "GRPO": {"normalise": "responses"},
    "DAPO": {"clip_high": 0.28},
    "Dr. GRPO": {"normalise": "constant", "advantage": "mean"},
    "GSPO": {"normalise": "responses", "ratio_of": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
    "CISPO": {"clip": "weight", "clip_high": 4.0},
}
FOUR_STEPS = HARD | {"minibatches": 4, "updates": 150}


def speed_of_learning(cell: Cell, log: list[dict]) -> dict[str, float]:
    """Return the mean reward of the first hundred updates, and what was clipped."""
    return {"early": mean_of(log[:100], "reward"), "clipped": mean_of(log, "clip_ratio")}


EXPERIMENTS["losses"] = Plan(
    "five published losses on the main job, four steps a rollout",
    [Cell({"loss": name}, "FB", FOUR_STEPS | flags, HARD) for name, flags in LOSSES.items()],
    "FB reinforced on 6-9 steps with four steps a rollout, in %:",
    [
        Claim("(ours) all five end above 90%", lambda *found: min(found) > 90,
              series("all", "loss", LOSSES)),
        Claim("(ours) and within five points of each other",
              lambda *found: max(found) - min(found) < 5, series("all", "loss", LOSSES)),
    ],
    {
        "pass@1": "all",
        "reward, mean of the updates 1-100": "early",
        "matching strategy": "match_rate",
        "clipped tokens": "clipped",
    },
    measure=speed_of_learning,
    curves={"reward": series("reward", "loss", LOSSES)},
)  # fmt: skip


def reproduce(name: str, config: ReproduceConfig) -> None:
    """Run an experiment's commands, read their rows and report."""
    plan, experiment = EXPERIMENTS[name], Experiment(name, config)
    others = Experiment(name, config)  # runs of other models than --only: none of them is started
    planned, rows, drawn = [], [], []
    for cell, seed in product(plan.cells, range(config.seeds)):
        chosen = experiment if config.only in ("", cell.model) else others
        flags = cell.sft if config.model else cell.sft_tiny | cell.sft
        sft = chosen.sft(cell.model, seed, **flags)
        rl, evaluation = chosen.rl(sft, seed, **cell.rl), None
        if cell.evaluation is not None:
            evaluation = chosen.compare(sft, rl, seed, **cell.evaluation)
        planned.append((cell, seed, sft, rl, evaluation))
    require(bool(experiment.runs), f"{name} trains no model {config.only}")
    left_out = {path for path, run in others.runs.items() if not run.finished()}
    experiment.run()
    for cell, seed, sft, rl, evaluation in planned:
        if (evaluation or rl).output in left_out:
            continue
        experiment.runs |= {run.output: run for run in (sft, rl, evaluation) if run}
        row, log = cell.row(seed, sft, evaluation), rl.log()
        rows.append(row | (plan.measure(cell, log) if plan.measure else {}))
        drawn.append(rows[-1] | {"log": log})
    claims = [claim for claim in plan.claims if claim.has_rows(rows, config.seeds)]
    verdicts = [claim.verdict(rows) for claim in claims]
    experiment.report(rows, plan.table(rows), verdicts, plan.draw(drawn))


def list_experiments(config: ReproduceConfig) -> None:
    """Print what each experiment is about and what its commands took when they last ran."""
    for name, plan in EXPERIMENTS.items():
        file, cost = Experiment(name, config).folder / f"{name}.json", "not run yet"
        if file.exists():
            last = read_json(file)
            cost = f"{last['minutes']:.0f} min of commands for {last['seeds']} seed(s)"
        print(f"{name:14} {plan.about} [{cost}]")


def main(config: ReproduceConfig) -> None:
    if config.list:
        return list_experiments(config)
    names = list(EXPERIMENTS) if config.experiment == ["all"] else config.experiment
    require(bool(names), f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    for name in names:
        known = f"there are {', '.join(EXPERIMENTS)} and all"
        require(name in EXPERIMENTS, f"there is no experiment {name!r}; {known}")
    require_min(config, seeds=1, jobs=0)
    require(config.only in ("", *MODELS), f"--only {config.only}: there are {', '.join(MODELS)}")
    require(bool(config.model) or not config.laptop, "--laptop needs a --model")
    for name in names:
        reproduce(name, config)


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(ReproduceConfig, __doc__, positional="experiment"))
