"""All plots. From the command line, the course of one GRPO run or of many:

python plot.py runs/grpo-hard-gf11
python plot.py runs/grpo-1 runs/grpo-2 runs/grpo-3 --out three.png
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from data.finite_field import BACKWARD, FORWARD
from run_folder import read_log
from runtime import check_outputs, parse_flags, refusals, require
from split import CAUSES
from strategies import MIXED, NONE

COLOURS = {"evaluation": "tab:blue", "inversion": "tab:orange", "composition": "tab:green"}
SHADES = {FORWARD: "tab:blue", BACKWARD: "tab:orange", MIXED: "tab:purple", NONE: "lightgrey"}
REASONS = dict(zip(("selection", *CAUSES), ("tab:green", "tab:red", "tab:olive", "lightgrey")))


@dataclass
class PlotConfig:
    runs: list = field(default_factory=list)  # run folders of train_grpo.py
    out: str = "training.png"  # the PNG to write


def new_figure(width: float, height: float, rows: int, columns: int):
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(axis, columns: int = 2) -> None:
    axis.legend(fontsize=8, ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)


def plot_evaluation(summaries: dict[str, dict], path: Path, reasons: dict | None = None) -> None:
    """Accuracy by number of steps and type; strategy shares by type; of two checkpoints also why accuracy changed."""
    figure, axes = new_figure(16.5 if reasons else 11, 4, 1, 3 if reasons else 2)
    draw_accuracy(axes[0], summaries)
    draw_strategies(axes[1], summaries)
    if reasons:
        draw_reasons(axes[2], reasons)
    save(figure, path)


def save(figure, path: Path) -> None:
    with refusals():
        figure.savefig(path, dpi=110)


def draw_accuracy(axis, summaries: dict[str, dict]) -> None:
    for i, (name, summary) in enumerate(summaries.items()):
        style = {"fmt": "o-"} if i == len(summaries) - 1 else {"fmt": "o--", "markerfacecolor": "white"}
        for j, (kind, by_steps) in enumerate(summary["by_type_and_steps"].items()):
            cells = list(by_steps.values())
            mean = np.array([c["pass@1"] for c in cells])
            low, high = np.array([c["ci95"] for c in cells]).T
            x = np.array([int(n) for n in by_steps]) + 0.08 * j  # side by side where they agree
            bars = [np.maximum(mean - low, 0), np.maximum(high - mean, 0)]
            axis.errorbar(x, mean, bars, color=COLOURS[kind], capsize=2, label=f"{kind} {name}", **style)
    axis.set(xlabel="number of steps", ylabel="pass@1", title="Accuracy, with 95% intervals", ylim=(0, 1.02))
    axis.xaxis.get_major_locator().set_params(integer=True)
    legend_below(axis)


def draw_strategies(axis, summaries: dict[str, dict]) -> None:
    columns = [(kind, name) for kind in next(iter(summaries.values()))["by_type"] for name in summaries]
    cells = [summaries[name]["by_type"][kind] for kind, name in columns]
    base = np.zeros(len(cells))
    for strategy, shade in SHADES.items():
        share = np.array([c[f"{strategy}_share"] for c in cells])
        if share.any():
            axis.bar(range(len(cells)), share, bottom=base, color=shade, label=strategy)
            base += share
    axis.set(xticks=range(len(cells)), ylabel="share of responses", title="Strategies", ylim=(0, 1.02))
    axis.set_xticklabels([f"{kind}\n{name}" for kind, name in columns])
    legend_below(axis)


def draw_reasons(axis, reasons: dict) -> None:
    """Beside one another what selection and what improvement brought, with 95% intervals; improvement by its causes,
    those that lost below zero."""
    rows = {"all": reasons["overall"], **reasons["by_type"]}
    rows |= {f"{n} step{'s' * (n != '1')}": figures for n, figures in reasons["by_steps"].items()}
    x, means = np.arange(len(rows)), {}
    for name in ("gain", "selection", "improvement", *CAUSES):
        means[name] = np.array([figures[name]["mean"] for figures in rows.values()])
    axis.bar(x - 0.2, means["selection"], 0.38, color=REASONS["selection"], label="selection")
    above, below = np.zeros(len(rows)), np.zeros(len(rows))
    for cause in CAUSES:
        part = means[cause]
        if np.abs(part).max() > 0.001:
            base = np.where(part > 0, above, below)
            axis.bar(x + 0.2, part, 0.38, bottom=base, color=REASONS[cause], label=f"improvement: {cause}")
        above, below = above + np.maximum(part, 0), below + np.minimum(part, 0)
    for side, name in ((-0.2, "selection"), (0.2, "improvement")):
        low, high = np.array([figures[name]["ci95"] for figures in rows.values()]).T
        bars = [np.maximum(means[name] - low, 0), np.maximum(high - means[name], 0)]
        axis.errorbar(x + side, means[name], bars, fmt="none", ecolor="black", elinewidth=0.9, capsize=2)
    axis.plot(x, means["gain"], "k_", markersize=22, label="gain: their sum")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xticks=x, ylabel="change of pass@1", title="Why accuracy changed")
    axis.set_xticklabels([name.replace(" ", "\n") for name in rows], fontsize=8)
    legend_below(axis)


# ------------------------------------------------------------------------------------------------------------------
# The course of a run


PANELS = {  # title: the metrics drawn, and the style of each
    "reward": {"reward": "-"},
    "accuracy by type": {f"accuracy/{kind}": style for kind, style in zip(COLOURS, ("-", "--", ":"))},
    "accuracy given the fitting strategy": {
        f"accuracy_given_fit/{kind}": style for kind, style in zip(COLOURS, ("-", "--", ":"))
    },
    "share of the fitting strategy": {f"fit_share/{kind}": style for kind, style in zip(COLOURS, ("-", "--", ":"))},
    "groups without signal": {"groups_without_signal": "-"},
    "entropy of a token, groups with signal": {"entropy": "-"},
    "KL divergence from the start, groups with signal": {"kl": "-"},
    "tokens a response": {"response_length": "-"},
}


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Running means over `width` values, over fewer at the ends."""
    window = np.ones(min(width, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def draw_smoothly(axis, rows: list[dict], metric: str, faint: float = 0.0, **style) -> None:
    """Running means of a metric over the updates; with `faint`, the opacity of its values, these behind them."""
    seen = [(row["update"], row[metric]) for row in rows if row.get(metric) is not None]
    if not seen:
        return
    updates, values = np.array(seen).T
    if faint:
        axis.plot(updates, values, color=style["color"], linewidth=0.6, alpha=faint)
    width = 1 + len(values) // 20
    axis.plot(updates, smooth(values, width), **style)
    axis.set_xlabel(f"update (running means of {width})" if width > 1 else "update")


def plot_training(runs: dict[str, list[dict]], path: Path) -> None:
    """What the logs of GRPO runs, by name, tell: a line style a problem type; running means in front.

    Colours tell runs apart or, where there is one alone, types.
    """
    figure, axes = new_figure(16, 7, 2, 4)
    for axis, (title, metrics) in zip(axes, PANELS.items()):
        for i, rows in enumerate(runs.values()):
            for j, (metric, style) in enumerate(metrics.items()):
                colour = f"C{(i if len(runs) > 1 else j) % 10}"
                draw_smoothly(axis, rows, metric, faint=0.25, color=colour, linestyle=style)
        axis.set_title(title, fontsize=10)
        logged = {metric for rows in runs.values() for row in rows for metric in row}
        if not axis.lines:
            why = "not computed: --beta is 0" if title.startswith("KL") else "no values"
            axis.text(0.5, 0.5, why, ha="center", transform=axis.transAxes, color="grey")
        elif len(metrics) > 1:  # which style is which type
            for j, (metric, style) in enumerate(metrics.items()):
                if metric in logged:
                    colour = "grey" if len(runs) > 1 else f"C{j}"
                    axis.plot([], [], style, color=colour, label=metric.split("/")[1])
            axis.legend(fontsize=8, frameon=False)
        if title == "reward" or title.startswith(("accuracy", "share", "groups")):
            axis.set_ylim(0, 1.02)
    for axis in axes[:4]:
        axis.set_xlabel("")
    if len(runs) > 1:
        handles = [axes[0].plot([], [], color=f"C{i % 10}", label=name)[0] for i, name in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main(config: PlotConfig) -> None:
    check_outputs("", config.out)
    require(bool(config.runs), "name the folder of a run, or of several")
    runs = {}
    for name in config.runs:
        log = Path(name) / "metrics.jsonl"
        require(log.is_file(), f"{name} is no run folder: it holds no metrics.jsonl")
        rows = read_log(log)
        require(bool(rows) and "reward" in rows[0], f"{log} is not the log of a GRPO run")
        runs[name] = rows
    plot_training(runs, Path(config.out))
    print(f"{config.out}: {', '.join(f'{name} ({len(rows)} updates)' for name, rows in runs.items())}")


if __name__ == "__main__":
    main(parse_flags(PlotConfig, __doc__, positional="runs"))
