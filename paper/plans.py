"""The paper's experiments as data: what each trains and evaluates, and what the paper claims of it.

A `Plan`'s cells give one row of numbers for each seed. The table, the verdicts and the figure are
made of these rows. "(ours)" marks a claim that is not the paper's.
"""

import math
from collections.abc import Callable
from statistics import fmean

from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION
from paper.experiment import MODELS, Cell, Claim, Plan, series

TYPES = (EVALUATION, INVERSION)
EASY, HARD, EXTREME = ({"difficulty": name} for name in ("easy", "hard", "extreme"))
MARGIN = 3  # points that count as a change; by chance one type moves so far in a seed in seven
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


def near(least: float = MARGIN) -> Callable[[float, float], bool]:
    return lambda before, after: abs(after - before) < least


def below(limit: float) -> Callable[..., bool]:
    return lambda *found: max(found) < limit


def above(limit: float) -> Callable[..., bool]:
    return lambda *found: min(found) > limit


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
              lambda *found: found[-1] > max(found[:-1]), nine),
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
# Cause: what a policy could do, before and after RL: our questions, to the runs of table 1

FORCED = {  # headings and keys of what eval.py --force measures, means over both types
    "opens the matching way": "access, matching",
    "right if forced": "execution, matching",
    "no wrong line": "faultless, matching",
    "opens the other way": "access, other",
    "right if forced to": "execution, other",
    "no wrong line there": "faultless, other",
}


def of_stages(evaluation: dict) -> list[Cell]:
    return [
        Cell({"stage": stage}, "FB", rl, HARD | evaluation, side)
        for stage, (rl, side) in STAGES.items()
    ]


EXPERIMENTS["openings"] = Plan(
    "access and execution of FB's strategies under forced openings (runs of table1)",
    of_stages({"force": "both", "samples": 16}),
    "FB on 6-9 steps: the matching strategy, and the other one. In %:",
    [
        Claim("(ours) RL on 2-5 steps takes the matching strategy, nearly always", above(95),
              series("access, matching", "stage", ["RL 2-5"])),
        Claim("(ours) and executes it no better than before", stays(),
              series("faultless, matching", "stage", ("SFT", "RL 2-5"))),
        Claim("(ours) RL on 6-9 steps executes it better", grows(5),
              series("faultless, matching", "stage", ("SFT", "RL 6-9"))),
        Claim("(ours) and the other one, too, which it no longer takes", grows(5),
              series("faultless, other", "stage", ("SFT", "RL 6-9"))),
    ],
    FORCED,
)  # fmt: skip

EXPERIMENTS["ceiling"] = Plan(
    "verified@k to 256 before and after RL (runs of table1)",
    of_stages({"samples": 256, "problems": 128}),
    "FB on 128 problems of 6-9 steps: one of k right, without a wrong line or a guess. In %:",
    [
        Claim("(ours) RL on 2-5 steps moves verified@1", grows(10),
              series("verified@1", "stage", ("SFT", "RL 2-5"))),
        Claim("(ours) and not the end of the curve, verified@256", near(),
              series("verified@256", "stage", ("SFT", "RL 2-5"))),
        Claim("(ours) RL on 6-9 steps moves the end, too", grows(),
              series("verified@256", "stage", ("SFT", "RL 6-9"))),
    ],
    {"pass@1": "all", "verified@1": "verified@1", "verified@16": "verified@16",
     "verified@256": "verified@256", "pass@256": "pass@256",
     "problems solved only after RL (number)": "solved", "only before": "lost"},
    lines="k",
)  # fmt: skip


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
        accuracy = f"accuracy in RL, SFT on {data}"
        panels |= {accuracy: of_types, f"{accuracy}, by steps": of_steps}
    return panels


def only_fb_above_90(*of_types: float) -> bool:
    b, f, fb = (min(pair) for pair in zip(of_types[:3], of_types[3:]))
    return fb > 90 > 20 > max(b, f)


EXPERIMENTS["dynamics"] = Plan(
    "accuracy in the course of RL, by type and by number of steps (runs of table1)",
    [
        Cell({"model": model, "updates": which}, model, HARD, HARD)
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
        Claim("(ours) and rises with it on balanced validation data, after RL",
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

SFT_PARTS = {  # what SFT shows: one part, or the last two of up to five, the others solved before
    "single parts": {},
    "the last two parts": {"updates": 3200, "parts": "1-5", "window": 2},
}
SIDES = {"SFT": "before", "RL": "after"}
TWO_THREE, THREE_FIVE = ({"parts": parts, "updates": 100} for parts in ("2-3", "3-5"))


def compositions(evaluation: dict) -> list[Cell]:
    return [
        Cell({"sft": name, "stage": stage}, "FB", EASY | THREE_FIVE, EASY | evaluation, side,
             flags, EASY | TWO_THREE)
        for name, flags in SFT_PARTS.items()
        for stage, side in SIDES.items()
    ]  # fmt: skip


EXPERIMENTS["composition"] = Plan(
    "RL on 2-3 and then 3-5 parts; SFT on single parts, or on the last two of up to five",
    compositions({"parts": "3-5"}),
    "Compositions of 3-5 parts, by what SFT showed. In %:",
    [
        Claim("RL learns 3-5 parts if SFT showed the last two: verified, by 30 points or more",
              grows(30), series("verified@1", "stage", SIDES, sft="the last two parts")),
        Claim("and not if it showed single parts",
              stays(5), series("verified@1", "stage", SIDES, sft="single parts")),
    ],
    {"pass@1": "all", "verified": "verified@1", "every part matches": "match_rate"},
    curves={"reward on 3-5 parts": series("reward", "sft", SFT_PARTS, stage="RL")},
)  # fmt: skip

EXPERIMENTS["third-part"] = Plan(
    "what these models do after two parts of three, solved in the prompt (runs of composition)",
    compositions({"parts": "3", "given": 2, "force": "both", "samples": 16}),
    "The third part, after two that are given. In %:",
    [
        Claim("(ours) SFT on single parts never opens a third", below(2),
              [x for part in ("access, matching", "access, other")
               for x in series(part, "sft", ["single parts"], stage="SFT")]),
        Claim("(ours) RL on compositions opens it the matching way, if SFT showed the last two",
              above(95),
              series("access, matching", "sft", ["the last two parts"], stage="RL")),
    ],
    FORCED,
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
        Claim("(ours) on the type that matches alone they are above 95%", above(95),
              [(model, kind, {"model": model, "stage": "SFT, on 2-5"})
               for model, kind in (("B", INVERSION), ("F", EVALUATION))]),
        Claim("(ours) the three are alike there, within five points",
              lambda *found: max(found) - min(found) < 5,
              series("all", "model", MODELS, stage="SFT, on 2-5")),
        Claim("after RL on 6-9 steps only FB is near perfect",
              lambda b, f, fb: fb > 90 > 70 > max(b, f),
              series("all", "model", MODELS, stage="RL 6-9")),
    ],
)  # fmt: skip


EXTREME_STAGES = {  # RL before, if there is any
    "SFT": ({}, "before"),
    "RL 6-15": ({}, "after"),
    "RL 6-9, then 6-15": (HARD, "after"),
}
EXPERIMENTS["extreme"] = Plan(
    "FB reinforced on 6-15 steps, at once or after RL on 6-9",
    [
        Cell({"stage": stage}, "FB", EXTREME, EXTREME, side, rl_first=first)
        for stage, (first, side) in EXTREME_STAGES.items()
    ],
    "Pass@1 in % on 6-15 steps:",
    [Claim("FB still improves clearly on 6-15 steps", grows(10),
           series("all", "stage", ("SFT", "RL 6-15")))],
    lines="steps",
)  # fmt: skip

GROUP_16 = {"group_size": 16, "updates": 150}  # the tiny model's: as many responses as the default
SETTINGS = {  # flags, and the paper's final accuracy of B, F and FB
    "default": ({}, (53, 60, 97)),
    "beta 0.1": ({"beta": 0.1}, (53, 58, 96)),
    "group 16": (GROUP_16, (58, 51, 98)),
    "group 16, beta 0.1": (GROUP_16 | {"beta": 0.1}, (53, 52, 97)),
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
