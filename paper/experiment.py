"""What an experiment consists of: cells, rows of their results, claims about these, and figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION, MATCHING_STRATEGY
from lib.openings import PARTS
from lib.plots import draw_smoothly, new_figure
from lib.tables import markdown

MODELS = {"B": "backward", "F": "forward", "FB": "mixed"}  # strategies in the SFT data

OTHER_STRATEGY = {EVALUATION: BACKWARD, INVERSION: FORWARD}  # which has to guess
ACCURACIES = ("all", INVERSION, EVALUATION)  # keys of a row's pass@1
Labels = dict[str, object]  # what tells rows apart, such as {"model": "FB", "stage": "SFT"}
Series = tuple[str, str, Labels]  # a name, a key of rows (of logs for curves), labels of the rows


@dataclass(frozen=True)
class Cell:
    """SFT, RL from it, and an evaluation of both. They give one row for each seed."""

    labels: Labels
    model: str  # B, F or FB
    rl: dict  # flags of train_grpo.py
    evaluation: dict  # flags of eval.py
    side: Literal["before", "after"] = "after"  # RL: the model that the row is about
    sft: dict = field(default_factory=dict)  # flags of train_sft.py
    rl_first: dict = field(default_factory=dict)  # flags of a run of RL before, if there is one

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.labels.values()))

    def row(self, seed: int, found: dict) -> dict:
        """Return what eval.py has found, in percent; 0 for an accuracy over no responses."""
        row, summary = self.labels | {"seed": seed}, found[self.side]
        overall = summary["overall"]
        groups, by_difficulty = {"all": overall, **summary["by_type"]}, summary["by_difficulty"]
        row["by_steps"] = {int(x.split()[0]): 100 * y["pass@1"] for x, y in by_difficulty.items()}
        row |= {name: 100 * groups[name]["pass@1"] for name in ACCURACIES if name in groups}
        row |= {name: 100 * x for name, x in overall.items() if "@" in name}
        others = ("match_rate", "accuracy_given_match", "forward_share", "backward_share")
        row |= {name: 100 * (overall[name] or 0.0) for name in others}
        for name in ("solved", "lost"):  # by RL, so none of SFT's own
            row[name] = found["difference"]["overall"][name] if self.side == "after" else 0
        if "openings" in found:
            row |= forced_row(found["openings"][self.side])
        return row


def forced_row(measured: dict) -> dict[str, float]:
    """Return each part of lib.openings' summary, of the matching strategy and of the other one.

    In percent, means over the types.
    """
    row = {}
    for part in PARTS:
        for which, strategy_of in (("matching", MATCHING_STRATEGY), ("other", OTHER_STRATEGY)):
            found = [measured[kind][s][part]["mean"] for kind, s in strategy_of.items()]
            row[f"{part}, {which}"] = 100 * fmean(found)
    return row


@dataclass(frozen=True)
class Plan:
    """An experiment: what it trains, the paper's claims about it, and its table and figure."""

    about: str
    cells: list[Cell]
    title: str  # of the table, which has a line for each cell
    claims: list["Claim"]
    columns: dict[str, str] = field(default_factory=lambda: {key: key for key in ACCURACIES})
    paper: dict[str, tuple] = field(default_factory=dict)  # by cell: its first columns
    measure: Callable[[Cell, list[dict]], dict] | None = None  # more of a row, from RL's log
    curves: dict | None = None  # draw curves of the logs, not bars of the table
    lines: Literal["", "steps", "k"] = ""  # or lines for the stages: accuracy by steps, or by k

    def table(self, rows: list[dict]) -> str:
        """Return means and ranges over the seeds as Markdown, then the paper's numbers."""
        headings = [*self.columns]
        of_paper = max(map(len, self.paper.values()), default=0)
        head = ["", *headings, *(f"paper: {heading}" for heading in headings[:of_paper])]
        lines = []
        for cell in self.cells:
            found = (values(rows, key, **cell.labels) for key in self.columns.values())
            paper = map(str, self.paper.get(cell.name, ()))
            lines.append([cell.name, *map(mean_and_range, found), *paper])
        return f"{self.title}\n\n{markdown(head, lines)}"

    def draw(self, rows: list[dict]):
        """Draw the rows; for curves each has the `log` of its RL run."""
        if self.lines:
            return line_figure(rows, self.lines)
        if self.curves:
            return curve_figure(rows, self.curves)
        return bar_figure(rows, self.cells, list(self.columns.values()), self.paper)


# ------------------------------------------------------------------------------------------------
# Rows hold one seed's numbers, in percent, and labels to find them by


def values(rows: list[dict], key: str, **labels) -> list:
    """Return what the rows with these labels hold under `key`: one value for each seed."""
    return [row[key] for row in rows if labels.items() <= row.items()]


def series(key: str, varying: str, names, **labels) -> list[Series]:
    """Return `key` of the rows whose label `varying` has each name, the other labels alike."""
    return [(str(name), key, labels | {varying: name}) for name in names]


@dataclass(frozen=True)
class Claim:
    """A sentence of the paper, or ours, which holds or does not hold for each seed by itself."""

    text: str
    holds: Callable[..., bool]  # takes one seed's numbers
    numbers: list[Series]

    def has_rows(self, rows: list[dict], seeds: int) -> bool:
        return all(len(values(rows, key, **labels)) == seeds for _, key, labels in self.numbers)

    def verdict(self, rows: list[dict]) -> list:
        """Return the text, what was found, and for each seed whether the claim holds."""
        found = [values(rows, key, **labels) for _, key, labels in self.numbers]
        names = [name for name, *_ in self.numbers]
        shown = ", ".join(f"{name}: {mean_and_range(x)}" for name, x in zip(names, found))
        return [self.text, shown, [self.holds(*of_seed) for of_seed in zip(*found, strict=True)]]


def mean_and_range(of_seeds: list[float]) -> str:
    low, high = min(of_seeds), max(of_seeds)
    return f"{fmean(of_seeds):.1f}" + (f" ({low:.1f}-{high:.1f})" if len(of_seeds) > 1 else "")


def verdict_table(verdicts: list[list]) -> str:
    """Format verdicts as Markdown; "in k of n seeds" where a claim holds for some seeds only."""
    rows = []
    for claim, found, held in verdicts:
        answer = f"**in {sum(held)} of {len(held)} seeds**" if any(held) else "**no**"
        rows.append([claim, found, "yes" if all(held) else answer])
    return markdown(["claim", "found", "holds"], rows)


# ------------------------------------------------------------------------------------------------
# Figures


def bar_figure(rows: list[dict], cells: list[Cell], keys: list[str], paper: dict):
    """Draw bars of `keys` for each cell: means, a dot for each seed, the paper's lines.

    paper: by cell, the paper's numbers for the first keys
    """
    figure, (axis,) = new_figure(3 + len(cells) * max(1, len(keys) / 2.5), 4, 1, 1)
    distance = 0.8 / len(keys)
    half = 0.45 * distance
    for i, key in enumerate(keys):
        for j, cell in enumerate(cells):
            x = j + distance * (i - (len(keys) - 1) / 2)
            found = values(rows, key, **cell.labels)
            label = key if j == 0 else None
            axis.bar(x, fmean(found), 2 * half, color=f"C{i}", alpha=0.75, label=label)
            axis.plot([x] * len(found), found, "k.", markersize=4)
            for height in paper.get(cell.name, ())[i : i + 1]:
                axis.plot([x - half, x + half], [height, height], "k-")
    if paper:
        axis.plot([], [], "k-", label="paper")
    axis.plot([], [], "k.", label="a seed")
    axis.set(xticks=range(len(cells)), ylim=(0, 102), ylabel="%")
    axis.set_xticklabels([cell.name.replace(", ", "\n") for cell in cells], fontsize=9)
    legend_above(axis, 3)
    return figure


def curve_figure(rows: list[dict], panels: dict[str, list[Series]]):
    """Draw metrics of the logs, panels by title, two a row: a curve a seed, in one colour."""
    panels = {t: xs for t, xs in panels.items() if any(values(rows, "log", **x[2]) for x in xs)}
    columns = min(2, len(panels))
    n_rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(max(7, 5 * columns), 4 * n_rows, n_rows, columns)
    for axis, (title, curves) in zip(axes, panels.items()):
        for color, (name, metric, labels) in enumerate(curves):
            for i, log in enumerate(values(rows, "log", **labels)):
                style = {"color": f"C{color}", "label": name if i == 0 else None}
                draw_smoothly(axis, log, metric, linewidth=1.3, **style)
        axis.set(ylabel=title, ylim=(0, 1.02))
        legend_above(axis)
    return figure


def legend_above(axis, columns: int = 5) -> None:
    place = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
    axis.legend(frameon=False, ncols=columns, fontsize=9, **place)


def line_figure(rows: list[dict], by: str):
    """Draw a line for each stage and seed: pass@1 by "steps", or verified@k by "k"."""
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for color, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        for i, row in enumerate(row for row in rows if row["stage"] == stage):
            of_k = {int(key[9:]): x for key, x in row.items() if key.startswith("verified@")}
            of_seed = row["by_steps"] if by == "steps" else of_k
            style = {"color": f"C{color}", "markersize": 4, "label": stage if i == 0 else None}
            axis.plot(list(of_seed), list(of_seed.values()), "o-", **style)
    axis.set(xlabel="number of steps", ylabel="pass@1 on validation problems, %", ylim=(0, 102))
    if by == "k":
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(of_seed), list(of_seed))
        axis.set(xlabel="k", ylabel="verified@k on validation problems, %")
    legend_above(axis)
    return figure
