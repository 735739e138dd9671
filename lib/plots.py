"""All plots. From the command line, the course of one GRPO run or of several:

python -m lib.plots ckpt/grpo-hard-gf11
python -m lib.plots ckpt/grpo-1 ckpt/grpo-2 ckpt/grpo-3 --out three.png
"""

import math
import os
import re
from dataclasses import dataclass, field
from itertools import cycle, zip_longest
from pathlib import Path

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # a name that matplotlib does not know would end its import
from matplotlib.figure import Figure

from lib.flags import parse_flags, quiet_pipes, require, require_writable, user_errors
from lib.gain import CAUSES
from lib.openings import PARTS
from lib.responses import by_number
from lib.run_dir import read_log
from lib.tables import rows_of

STRATEGY_COLOURS = ("tab:blue", "tab:orange", "tab:purple", "lightgrey", "tab:green", "tab:brown")
CAUSE_COLOURS = ("tab:red", "tab:olive", "lightgrey")
LINE_STYLES = ("-", "--", ":")
MANY_SAMPLES = 16  # responses to a problem, from which pass@k is drawn as a curve


@dataclass
class PlotConfig:
    runs: list = field(default_factory=list)  # run folders of train_grpo.py
    out: str = "training.png"  # the PNG to write


def new_figure(width: float, height: float, rows: int, columns: int):
    """Return a figure and its axes as a flat array."""
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plain(text: str) -> str:
    """Return a label that is drawn as it is: $ would begin a formula, and _ hide it in legends."""
    text = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text[:1] in ("", "_") else text


def legend_below(axis) -> None:
    if not axis.get_legend_handles_labels()[0]:
        return
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, ncols=2, frameon=False)


def save(figure, path: Path | str) -> None:
    with user_errors():
        figure.savefig(path, dpi=110)


def plot_evaluation(summaries: dict[str, dict], path: Path | str, metrics: dict) -> None:
    """Draw eval.summarise's summaries by name, and what else is in eval.report's metrics."""
    rows = [[(draw_accuracy, summaries), (draw_strategies, summaries)]]
    if metrics.get("reasons"):
        rows[0].append((draw_reasons, metrics["reasons"], metrics["imputed"]))
    if next(iter(summaries.values()))["overall"]["samples"] >= MANY_SAMPLES:
        rows[0].append((draw_pass_at_k, summaries))
    if "openings" in metrics:
        rows.append([(draw_openings, metrics["openings"], part) for part in PARTS])
    columns = max(map(len, rows))
    figure, axes = new_figure(5.5 * columns, 4 * len(rows), len(rows), columns)
    for panels, of_row in zip(rows, axes.reshape(len(rows), columns)):
        for axis, panel in zip_longest(of_row, panels):
            if panel:
                draw, *data = panel
                draw(axis, *data)
            else:
                axis.set_visible(False)
    save(figure, path)


def draw_intervals(axis, x: np.ndarray, metrics: list[dict], mean: str, **style) -> None:
    """Draw the means of all metrics, and their intervals "ci95"."""
    means = np.array([of_one[mean] for of_one in metrics])
    low, high = np.array([of_one["ci95"] for of_one in metrics]).T
    bars = np.maximum([means - low, high - means], 0)
    axis.errorbar(x, means, bars, capsize=2, **style)


def draw_accuracy(axis, summaries: dict[str, dict]) -> None:
    style, names = {"fmt": "o--", "markerfacecolor": "white"}, []
    for by_difficulty in next(iter(summaries.values()))["by_both"].values():
        names += [name for name in by_difficulty or ["all"] if name not in names]
    names.sort(key=by_number)
    for i, (name, summary) in enumerate(summaries.items()):
        if i == len(summaries) - 1:
            style = {"fmt": "o-"}
        for j, (kind, by_difficulty) in enumerate(summary["by_both"].items()):
            found = by_difficulty or {"all": summary["by_type"][kind]}
            x = np.array([names.index(n) for n in found]) + 0.08 * j  # side by side if they agree
            style |= {"color": f"C{j % 10}", "label": plain(f"{kind} {name}")}
            draw_intervals(axis, x, list(found.values()), "pass@1", **style)
    axis.set(ylabel="pass@1", ylim=(0, 1.02), xticks=range(len(names)))
    axis.set_xticklabels([plain(name).replace(" ", "\n") for name in names], fontsize=8)
    axis.set_title("Accuracy, with 95% intervals")
    legend_below(axis)


def draw_strategies(axis, summaries: dict[str, dict]) -> None:
    kinds = next(iter(summaries.values()))["by_type"]
    columns = [(kind, name) for kind in kinds for name in summaries]
    metrics = [summaries[name]["by_type"][kind] for kind, name in columns]
    keys, base = [key for of_column in metrics for key in of_column], np.zeros(len(columns))
    shares = dict.fromkeys(key for key in keys if key.endswith("_share"))  # in order
    for key, colour in zip(shares, cycle(STRATEGY_COLOURS)):
        share = np.array([of_column.get(key, 0.0) for of_column in metrics])
        if share.any():
            style = {"color": colour, "label": plain(key.removesuffix("_share"))}
            axis.bar(range(len(columns)), share, bottom=base, **style)
            base += share
    axis.set(ylabel="share of responses", title="Strategies", ylim=(0, 1.02))
    axis.set_xticks(range(len(columns)), [plain(f"{kind}\n{name}") for kind, name in columns])
    legend_below(axis)


def draw_reasons(axis, reasons: dict, imputed: dict) -> None:
    """Draw what selection and improvement, stacked by its causes where known, brought to pass@1.

    A cross marks what they are if accuracies are imputed, where that is something else.
    """
    rows, of_imputed = map(rows_of, (reasons, imputed))
    means = {key: np.array([row[key]["mean"] for row in rows.values()]) for key in rows["all"]}
    x = np.arange(len(rows))
    axis.bar(x - 0.2, means["selection"], 0.38, color="tab:green", label="selection")
    above, below = np.zeros(len(rows)), np.zeros(len(rows))
    stacked = {cause: f"improvement: {cause}" for cause in CAUSES if cause in means}
    stacked = stacked or {"improvement": "improvement"}
    for (cause, label), colour in zip(stacked.items(), CAUSE_COLOURS):
        part = means[cause]
        if np.abs(part).max() > 0.001:
            style = {"color": colour, "label": label}
            axis.bar(x + 0.2, part, 0.38, bottom=np.where(part > 0, above, below), **style)
        above, below = above + np.maximum(part, 0), below + np.minimum(part, 0)
    style = {"fmt": "none", "ecolor": "black", "elinewidth": 0.9}
    for side, key in ((-0.2, "selection"), (0.2, "improvement")):
        draw_intervals(axis, x + side, [row[key] for row in rows.values()], "mean", **style)
        if imputed != reasons:
            heights = [row[key]["mean"] for row in of_imputed.values()]
            label = "imputed" if key == "selection" else None
            axis.plot(x + side, heights, "kx", label=label)
    axis.plot(x, means["gain"], "k_", markersize=22, label="gain: their sum")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(ylabel="change of pass@1", title="Why accuracy changed")
    axis.set_xticks(x, [plain(name).replace(" ", "\n") for name in rows], fontsize=8)
    legend_below(axis)


def draw_pass_at_k(axis, summaries: dict[str, dict]) -> None:
    """Draw pass@k, and of the paper's task verified@k, with their intervals."""
    for i, (name, summary) in enumerate(summaries.items()):
        intervals = summary["overall"]["intervals"]
        for what, line in (("pass", "--"), ("verified", "-")):
            keys = [key for key in intervals if key.startswith(f"{what}@")]
            if not keys:  # verified: of the paper's task alone
                continue
            ks = [int(key.partition("@")[2]) for key in keys]
            means, label = [summary["overall"][key] for key in keys], plain(f"{what}@k {name}")
            axis.plot(ks, means, line, color=f"C{i}", label=label)
            band = np.array([intervals[key] for key in keys]).T
            axis.fill_between(ks, *band, color=f"C{i}", alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, ks)
    axis.set(xlabel="k", ylim=(0, 1.02), title="At least one of k right")
    legend_below(axis)


def draw_openings(axis, measured: dict[str, dict], part: str) -> None:
    """Draw a part of lib.openings' summaries by type and strategy, bars side by side by name."""
    groups = next(iter(measured.values()))
    columns = [(kind, strategy) for kind in groups for strategy in groups[kind]]
    for i, (name, of_one) in enumerate(measured.items()):
        values = [of_one[kind][strategy][part] for kind, strategy in columns]
        x = np.arange(len(columns)) + 0.4 * (i - (len(measured) - 1) / 2)
        style = {"color": f"C{i}", "alpha": 0.75, "label": plain(name)}
        axis.bar(x, [value["mean"] for value in values], 0.38, **style)
        draw_intervals(axis, x, values, "mean", fmt="none", ecolor="black", elinewidth=0.9)
    axis.set_xticks(range(len(columns)), [f"{kind}\n{s}" for kind, s in columns], fontsize=8)
    axis.set(ylim=(0, 1.02), ylabel="share of responses", title=f"{part}: {PARTS[part]}")
    legend_below(axis)


PANELS = {  # title: a metric of the log, or with /* one for each problem type
    "reward": "reward",
    "accuracy by type": "accuracy/*",
    "accuracy given the matching strategy": "accuracy_given_match/*",
    "share of the matching strategy": "match_rate/*",
    "groups whose rewards are all equal": "frac_reward_zero_std",
    "entropy per token, groups with signal": "entropy",
    "KL divergence from the start, groups with signal": "kl",
    "tokens per response": "response_length",
}
OF_LABELS = {  # what these show for a task of one's own, whose strategies are any labels
    "accuracy_given_match/*": ("accuracy given each strategy", r"accuracy_given_(.+)"),
    "match_rate/*": ("share of each strategy", r"(.+)/all"),
}
SHARES = ("accuracy", "match_rate", "frac")  # metrics that lie between 0 and 1


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return running means over `width` values, over fewer at the ends."""
    window = np.ones(min(width, len(values)))
    counts = np.convolve(np.ones(len(values)), window, "same")
    return np.convolve(values, window, "same") / counts


def draw_smoothly(axis, rows: list[dict], metric: str, faint: float = 0.0, **style) -> None:
    """Draw running means of a metric over the updates; `faint` is the opacity of its raw values."""
    points = [(row["update"], row[metric]) for row in rows if row.get(metric) is not None]
    if not points:
        return
    updates, values = np.array(points).T
    if faint:
        axis.plot(updates, values, color=style["color"], linewidth=0.6, alpha=faint)
    width = 1 + len(values) // 20
    axis.plot(updates, smooth(values, width), **style)
    axis.set_xlabel(f"update (running means of {width})" if width > 1 else "update")


def plot_training(runs: dict[str, list[dict]], path: Path) -> None:
    """Draw GRPO runs' logs, by name: a line style per problem type, a colour per run (or type)."""
    n_rows = math.ceil(len(PANELS) / 4)
    figure, axes = new_figure(16, 3.5 * n_rows, n_rows, 4)
    logged = {key for rows in runs.values() for row in rows for key in row if row[key] is not None}
    of_kinds = (key for key in logged if key.startswith(("accuracy/", "validation/")))
    kinds = sorted({key.partition("/")[2] for key in of_kinds})
    for axis, (title, metric) in zip(axes, PANELS.items()):
        metrics = [metric.replace("*", kind) for kind in kinds] if "*" in metric else [metric]
        names = kinds
        if metric == "accuracy/*" and any(key.startswith("validation/") for key in logged):
            title += "; dots: validation"
        if metric in OF_LABELS and logged.isdisjoint(metrics):
            title, pattern = OF_LABELS[metric]
            metrics = [key for key in sorted(logged) if re.fullmatch(pattern, key)]
            names = [re.fullmatch(pattern, key)[1] for key in metrics]
        for j, (name, line) in enumerate(zip(metrics, cycle(LINE_STYLES))):
            for i, rows in enumerate(runs.values()):
                colour = f"C{(i if len(runs) > 1 else j) % 10}"
                draw_smoothly(axis, rows, name, faint=0.25, color=colour, linestyle=line)
                if metric == "accuracy/*":
                    of_kind = f"validation/{kinds[j]}"
                    points = np.array([(row["update"], row.get(of_kind)) for row in rows], float)
                    axis.plot(*points.T, "o", color=colour, markersize=4)  # NaN is not drawn
            if len(metrics) > 1:  # which style is which type
                colour = "grey" if len(runs) > 1 else f"C{j % 10}"
                axis.plot([], [], line, color=colour, label=plain(names[j]))
                axis.legend(fontsize=8, frameon=False)
        axis.set_title(title, fontsize=10)
        if not axis.lines:
            no_reference = metric == "kl" and "entropy" in logged
            why = "not computed: --beta is 0" if no_reference else "no values"
            axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes, color="grey")
        if metric.startswith(SHARES):
            axis.set_ylim(0, 1.02)
    for axis in axes[: len(PANELS) - 4]:  # all but the lowest of each column
        axis.set_xlabel("")
    for axis in axes[len(PANELS) :]:
        axis.set_visible(False)
    if len(runs) > 1:
        plot = axes[0].plot
        handles = [plot([], [], color=f"C{i % 10}", label=plain(x))[0] for i, x in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main(config: PlotConfig) -> None:
    require_writable("", config.out)
    require(bool(config.runs), "name the folder of a run, or of several")
    runs = {}
    for name in config.runs:
        log = Path(name) / "metrics.jsonl"
        require(os.path.isfile(log), f"{name} is no run folder: it holds no metrics.jsonl")
        rows = runs[name] = read_log(log)
        whole = rows and all(row.keys() >= {"update", "reward"} for row in rows)
        values = [x for row in rows for x in row.values() if x is not None]
        sound = whole and all(isinstance(x, int | float) and abs(x) < 1e300 for x in values)
        require(sound, f"{log} is not the log of a GRPO run")
    plot_training(runs, Path(config.out))
    drawn = ", ".join(f"{name} ({len(rows)} updates)" for name, rows in runs.items())
    print(f"{config.out}: {drawn}")


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(PlotConfig, __doc__, positional="runs"))
