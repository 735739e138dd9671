"""Reproduce the paper's experiments: run the commands, hold the results against the paper's.

    python -m paper.reproduce --list                # the experiments, and how long they took last
    python -m paper.reproduce table1                # one seed
    python -m paper.reproduce table1 --seeds 3
    python -m paper.reproduce table1 --model models/smollm2

Every number comes from a command that is printed below the table. Finished commands are not run
again, and an interrupted one resumes. On the CPU as many run side by side as there are cores, one
thread each. Runs lie in ckpt/reproduce, results in paper/results/NAME: NAME.json, NAME.md, NAME.png.

A `Plan` says what an experiment trains and what becomes of it. Each of its cells gives one row of
numbers for each seed; the table, the verdicts and the bars are made of these rows alone. A claim is
judged for each seed by itself.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from data.finite_field import EVALUATION, FORWARD, INVERSION
from lib.flags import parse_flags, read_json, require, require_min
from lib.plots import draw_smoothly, new_figure
from paper.experiment import MODELS, Experiment, Run, Verdict, markdown

MARGIN = 3  # percentage points below which two evaluations count as equal
TYPES = (EVALUATION, INVERSION)
ALL_AND_TYPES = ("all", INVERSION, EVALUATION)  # the keys of a row's pass@1

Labels = dict[str, object]  # what tells rows apart, such as {"model": "FB", "stage": "SFT"}
Column = tuple[str, str, Labels]  # heading, key of the rows, labels of the rows


@dataclass(frozen=True)
class Cell:
    """One row of results for each seed: SFT, RL from it, and an evaluation of both models."""

    labels: Labels
    model: str  # B, F or FB
    rl: dict  # flags of train_grpo.py
    evaluation: dict | None = None  # flags of eval.py; None: the logs are all that is needed
    side: Literal["before", "after"] = "after"  # RL: the model that the row is about
    sft: dict = field(default_factory=dict)  # flags of train_sft.py
    sft_tiny: dict = field(default_factory=dict)  # more flags, without --model


@dataclass(frozen=True)
class Table:
    """A line for each group of rows: means and ranges over the seeds, then the paper's numbers."""

    title: str
    head: str  # of the first column
    lines: dict[str, Labels]
    columns: list[Column]
    paper_head: tuple[str, ...] = ()
    paper: dict[str, tuple] = field(default_factory=dict)  # line: the paper's numbers


# ------------------------------------------------------------------------------------------------
# Rows, in percent


def percentages(summary: dict) -> dict[str, float]:
    """Return what rows take from eval.py's metrics; 0 for an accuracy over no responses."""
    overall, groups = summary["overall"], {"all": summary["overall"], **summary["by_type"]}
    row = {name: 100 * groups[name]["pass@1"] for name in ALL_AND_TYPES if name in groups}
    others = ("match_rate", "accuracy_given_match", "forward_share", "backward_share")
    return row | {name: 100 * (overall[name] or 0.0) for name in others}


def evaluated(cell: Cell, sft: Run, rl: Run, evaluation: Run) -> dict:
    return percentages(evaluation.result()[cell.side])


def tenth(log: list[dict], which: str) -> list[dict]:
    """Return the first or last tenth of a log, rounded up."""
    n = math.ceil(len(log) / 10)
    return log[:n] if which == "first tenth" else log[-n:]


def mean_of(log: list[dict], metric: str) -> float:
    """Return a metric's mean in percent over the updates that have it."""
    return 100 * fmean(row[metric] for row in log if metric in row)


def values(rows: list[dict], key: str, **labels) -> list:
    """Return what the rows with these labels have under `key`, one value for each seed."""
    return [row[key] for row in rows if all(row[name] == label for name, label in labels.items())]


# ------------------------------------------------------------------------------------------------
# Tables and verdicts


def mean_and_range(of_seeds: list[float]) -> str:
    low, high = min(of_seeds), max(of_seeds)
    return f"{fmean(of_seeds):.1f}" + (f" ({low:.1f}-{high:.1f})" if len(of_seeds) > 1 else "")


def format_table(table: Table, rows: list[dict]) -> str:
    lines = []
    for name, labels in table.lines.items():
        found = [values(rows, key, **labels, **more) for _, key, more in table.columns]
        lines.append([name, *map(mean_and_range, found), *map(str, table.paper.get(name, ()))])
    head = [table.head, *(heading for heading, *_ in table.columns), *table.paper_head]
    return f"{table.title}\n\n{markdown(head, lines)}"


def arrows(*found: list[float]) -> str:
    return " -> ".join(map(mean_and_range, found))


def by_name(found: dict[str, list[float]], sign: str = "") -> str:
    return ", ".join(f"{name} {sign}{mean_and_range(of_seeds)}" for name, of_seeds in found.items())


def judge(
    claim: str, holds: Callable[..., bool], *found: list[float], shown: str | None = None
) -> Verdict:
    """Judge a claim for each seed by itself.

    holds: takes the values of one seed, in the order of `found`
    found: lists with a value for each seed
    shown: what the table says was found, unless it is `found`
    """
    held = [holds(*of_seed) for of_seed in zip(*found, strict=True)]
    return claim, arrows(*found) if shown is None else shown, held


def grows(least: float = MARGIN) -> Callable[[float, float], bool]:
    return lambda before, after: after - before >= least


def stays(least: float = MARGIN) -> Callable[[float, float], bool]:
    return lambda before, after: after - before < least


def stay_below(limit: float) -> Callable[..., bool]:
    return lambda *found: max(found) < limit


# ------------------------------------------------------------------------------------------------
# Figures


def draw_bars(
    axis, rows: list[dict], groups: dict[str, Labels], bars: list[Column], paper: dict | None = None
) -> None:
    """Draw groups of bars: means as bars, seeds as dots, the paper's numbers as lines.

    groups: by the tick below each
    bars: of each group
    paper: a number for each bar, by group
    """
    distance = 0.8 / len(bars)
    width = 0.9 * distance
    for i, (label, key, more) in enumerate(bars):
        for j, (group, labels) in enumerate(groups.items()):
            x = j + distance * (i - (len(bars) - 1) / 2)
            found = values(rows, key, **labels, **more)
            once = label if j == 0 else None
            axis.bar(x, fmean(found), width, color=f"C{i}", alpha=0.75, label=once)
            axis.plot([x] * len(found), found, "k.", markersize=4)
            if paper:
                axis.plot([x - width / 2, x + width / 2], [paper[group][i]] * 2, "k-")
    axis.set(xticks=range(len(groups)), ylim=(0, 102))
    axis.set_xticklabels(groups)


def draw_seeds(axis, logs: list[list[dict]], metric: str, color, label: str) -> None:
    """Draw a curve for each seed's log, in one colour and with one label."""
    for i, log in enumerate(logs):
        once = label if i == 0 else None
        draw_smoothly(axis, log, metric, color=color, label=once, linewidth=1.3)


def legend_above(axis) -> None:
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axis.legend(frameon=False, ncols=4, fontsize=9, **place)


# ------------------------------------------------------------------------------------------------
# Table 1: which model learns what by RL on which problems

EASY, HARD, EXTREME = ({"difficulty": name} for name in ("easy", "hard", "extreme"))
STAGES = {"SFT": (HARD, "before"), "RL 2-5": (EASY, "after"), "RL 6-9": (HARD, "after")}
PAPER_TABLE1 = {  # pass@1 on 6-9 steps: all, inversion, evaluation
    ("B", "SFT"): (24.5, 38.9, 11.9),
    ("B", "RL 2-5"): (18.4, 25.6, 10.1),
    ("B", "RL 6-9"): (50.8, 96.0, 11.6),
    ("F", "SFT"): (57.0, 10.7, 97.1),
    ("F", "RL 2-5"): (48.0, 9.3, 91.7),
    ("F", "RL 6-9"): (58.3, 11.0, 99.3),
    ("FB", "SFT"): (47.0, 27.1, 64.3),
    ("FB", "RL 2-5"): (60.0, 32.2, 91.5),
    ("FB", "RL 6-9"): (95.7, 94.1, 97.1),
}
OF_ALL_AND_TYPES: list[Column] = [(name, name, {}) for name in ALL_AND_TYPES]
OF_TYPES: list[Column] = [(name, name, {}) for name in TYPES]


def by_model_and_stage(stages) -> dict[str, Labels]:
    return {f"{m}, {stage}": {"model": m, "stage": stage} for m in MODELS for stage in stages}


TABLE1 = Table(
    "Pass@1 in % on 6-9 steps, mean and range of the seeds:",
    "model",
    by_model_and_stage(STAGES),
    OF_ALL_AND_TYPES,
    ("paper: all", INVERSION, EVALUATION),
    {", ".join(cell): numbers for cell, numbers in PAPER_TABLE1.items()},
)


def table1_claims(rows: list[dict]) -> list[Verdict]:
    to_easy, to_hard = ("SFT", "RL 2-5"), ("SFT", "RL 6-9")
    claims = [  # claim, when it holds, model, key, stages
        ("selection: the share of the matching strategy goes from about half to above 95%",
         lambda sft, rl: 35 < sft < 65 and rl > 95, "FB", "match_rate", to_hard),
        ("improvement: accuracy given the matching strategy rises by RL on 6-9",
         grows(5), "FB", "accuracy_given_match", to_hard),
        ("and needs harder data: it does not by RL on 2-5",
         stays(), "FB", "accuracy_given_match", to_easy),
        ("FB gains by RL on 2-5", grows(), "FB", "all", to_easy),
    ]  # fmt: skip
    for model, matching, other, unknown in (
        ("F", EVALUATION, INVERSION, "backward"),
        ("B", INVERSION, EVALUATION, "forward"),
    ):
        claims += [
            (f"{model}: no new strategy, share of {unknown} responses",
             stay_below(1), model, f"{unknown}_share", STAGES),
            (f"{model}: {other} stays within chance (9%)", stay_below(15), model, other, STAGES),
            (f"{model} improves on {matching} by RL on 6-9", grows(), model, matching, to_hard),
            (f"{model} does not improve on {matching} by RL on 2-5",
             stays(), model, matching, to_easy),
        ]  # fmt: skip
    start, best = (values(rows, "all", model="FB", stage=stage) for stage in to_hard)
    verdicts = [
        judge(
            "FB with RL on 6-9 steps is the best of the nine, above 90% on both types",
            lambda best, one, other, *nine: best == max(nine) and min(one, other) > 90,
            best,
            *(values(rows, kind, model="FB", stage="RL 6-9") for kind in TYPES),
            *(values(rows, "all", model=model, stage=stage) for model, stage in PAPER_TABLE1),
            shown=arrows(start, best),
        )
    ]
    for claim, holds, model, key, stages in claims:
        found = (values(rows, key, model=model, stage=stage) for stage in stages)
        verdicts.append(judge(claim, holds, *found))
    return verdicts


def table1_figure(rows: list[dict]):
    """Draw accuracy by type of the nine models."""
    figure, axes = new_figure(11, 3.6, 1, 3)
    for axis, model in zip(axes, MODELS):
        groups = {stage: {"model": model, "stage": stage} for stage in STAGES}
        paper = {stage: PAPER_TABLE1[model, stage][:0:-1] for stage in STAGES}
        draw_bars(axis, rows, groups, OF_TYPES, paper)
        axis.set_title(f"SFT on {MODELS[model]}")
    axes[0].plot([], [], "k-", label="paper")
    axes[0].plot([], [], "k.", label="a seed")
    axes[0].set_ylabel("pass@1 on 6-9 steps, %")
    axes[0].legend(fontsize=8, frameon=False)
    return figure
