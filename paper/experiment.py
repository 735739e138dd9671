"""Run an experiment's commands, each once and several side by side, and report their results."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from data.finite_field import BACKWARD, EVALUATION, FORWARD, INVERSION, MATCHING_STRATEGY
from lib.checkpoint import load_meta, newest_checkpoint
from lib.flags import flag_name, read_json, require, user_errors, warn, write_json
from lib.limits import core_limit
from lib.openings import PARTS
from lib.plots import draw_smoothly, new_figure, save
from lib.run_dir import read_log, resumed_start
from lib.tables import markdown

ROOT = Path(__file__).parent.parent  # where the scripts lie
SCRIPTS = ("train_sft.py", "train_grpo.py", "eval.py")  # each needs what those before it wrote
MODELS = {"B": "backward", "F": "forward", "FB": "mixed"}  # strategies in the SFT data

OTHER_STRATEGY = {EVALUATION: BACKWARD, INVERSION: FORWARD}  # which has to guess
ACCURACIES = ("all", INVERSION, EVALUATION)  # keys of a row's pass@1
Labels = dict[str, object]  # what tells rows apart, such as {"model": "FB", "stage": "SFT"}
Series = tuple[str, str, Labels]  # a name, a key of rows (of logs for curves), labels of the rows


@dataclass
class ReproduceConfig:
    experiment: list = field(default_factory=list)  # its name, or all
    model: str = ""  # a pretrained model's folder or hub name, with the paper's recipe [tiny]
    laptop: bool = False  # train --model with --laptop, and evaluate it on 128 problems
    only: str = ""  # B, F or FB: run its commands alone; rows of the others are kept
    seeds: int = 1  # runs of each cell, with seeds 0, 1, ...
    jobs: int = 0  # commands side by side [0: of the tiny model on the CPU one per core, else one]
    list: bool = False  # list the experiments


@dataclass(frozen=True)
class Run:
    """A command, and the folder or JSON file that holds its result."""

    script: str
    arguments: tuple[str, ...]
    flags: dict[str, str]
    output: Path

    def command(self) -> list[str]:
        flags = [word for name, value in self.flags.items() for word in (flag_name(name), value)]
        flags = [word for word in flags if word != "True"]  # --laptop takes no value
        return [self.script, *self.arguments, *flags]

    def __str__(self) -> str:
        return shlex.join(["python", *self.command()])

    @property
    def turn(self) -> tuple[int, int]:
        """When it can run: after the scripts before, and after RL that it goes on from."""
        return SCRIPTS.index(self.script), self.output.name.count("-rl-")

    def finished(self) -> bool:
        """Return whether its result is complete. Refuse one of other flags or another start."""
        if self.output.suffix == ".json":
            return self.output.exists() and self.output.read_text().endswith("\n}\n")  # not cut off
        newest = newest_checkpoint(self.output)
        meta = load_meta(newest) if newest else {}
        for name, now in ({"laptop": "False"} | self.flags).items():
            then = str(meta.get(name, now))
            message = f"{self.output} was made with {flag_name(name)} {then}, not {now}"
            require(then == now or name == "out", f"{message}: move it away")
        resumed_start(self.output, meta)
        return bool(newest) and meta["update"] == meta["total"]

    @property
    def minutes_file(self) -> Path:
        """The file that keeps how many minutes it has taken so far."""
        return self.output.with_name(f"{self.output.name}.minutes")

    def log(self) -> list[dict]:
        return read_log(self.output / "metrics.jsonl")


def name_of(what: str, flags: dict) -> str:
    return "-".join([what, *(f"{name}-{value}" for name, value in flags.items())])


@dataclass
class Experiment:
    """The runs of an experiment: `add` all that it needs, `run` them, then read their results."""

    name: str
    config: ReproduceConfig
    runs: dict[Path, Run] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        model = Path(self.config.model).name
        return Path("paper/results") / (f"{self.name}-{model}" if model else self.name)

    def add(self, script: str, output: Path, *arguments: str, **flags) -> Run:
        """Return the run that writes `output`: one run serves all the cells that need it."""
        texts = {name: str(value) for name, value in flags.items()}
        return self.runs.setdefault(output, Run(script, arguments, texts, output))

    def sft(self, model: str, seed: int, **flags) -> Run:
        """Add SFT on the strategies of B, F or FB."""
        name = name_of(f"sft-{model}-{seed}", flags)
        out = Path("ckpt/reproduce") / (Path(self.config.model).name or "tiny") / name
        if self.config.model:
            laptop = {"laptop": True, "epochs": 8} if self.config.laptop else {}
            flags = {"model": self.config.model} | laptop | flags
        return self.add("train_sft.py", out, strategy=MODELS[model], seed=seed, **flags, out=out)

    def rl(self, init: Run, seed: int, **flags) -> Run:
        """Add RL from an SFT run."""
        out = init.output.with_name(name_of(f"{init.output.name}-rl", flags))
        if self.config.laptop:
            flags = {"laptop": True, "updates": 80} | flags
        return self.add("train_grpo.py", out, init=init.output, seed=seed, **flags, out=out)

    def compare(self, before: Run, after: Run, seed: int, **flags) -> Run:
        """Add an evaluation of both on the seed's validation problems, at RL's temperature."""
        if self.config.model:
            flags["temperature"] = 0.7
        if self.config.laptop:
            flags["problems"] = 128
        flags = flags | {"seed": seed}
        out = after.output / f"{name_of('evaluated', flags)}.json"
        flags["json"] = out
        return self.add("eval.py", out, str(before.output), str(after.output), **flags)

    def run(self) -> None:
        """Say what has not been done, and do it: all SFT, then all RL, then all evaluations."""
        n_cores = core_limit()
        large = self.config.model or torch.cuda.is_available()
        jobs = self.config.jobs or (1 if large else n_cores)
        threads = str(max(1, n_cores // jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        runs = sorted(self.runs.values(), key=lambda run: run.turn)
        left = [run for run in runs if not run.finished()]
        heading = f"{self.name}: {len(left)} of {len(runs)} commands are left"
        print(heading, *left, sep="\n", flush=True)
        try:
            for _, side_by_side in groupby(left, key=lambda run: run.turn):
                with ThreadPoolExecutor(jobs) as pool:
                    list(pool.map(lambda run: execute(run, environment, jobs == 1), side_by_side))
        except KeyboardInterrupt:  # a terminal sends it to the commands, too, which have saved now
            warn("stopped; the same command goes on from here")
            raise

    def report(self, rows: list[dict], table: str, verdicts: list[list], figure) -> None:
        """Print the table and the verdicts, and write them with the rows and the figure."""
        minutes_files = [run.minutes_file for run in self.runs.values()]
        minutes = None  # known if all commands were run here
        if all(file.exists() for file in minutes_files):
            minutes = round(sum(float(file.read_text()) for file in minutes_files), 1)
        took = "" if minutes is None else f", which took {minutes:.0f} minutes in all"
        commands = "\n".join(map(str, self.runs.values()))
        details = f"<details><summary>The commands{took}</summary>"
        details += f"\n\n```\n{commands}\n```\n\n</details>\n"
        text = "\n\n".join([table, verdict_table(verdicts), details])
        result = {"seeds": self.config.seeds, "minutes": minutes}
        result |= {"rows": rows, "claims": verdicts}
        with user_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{self.name}.json", result)
            (self.folder / f"{self.name}.md").write_text(text)
        save(figure, self.folder / f"{self.name}.png")
        print(f"\n{text}\n{self.folder}")


def execute(run: Run, environment: dict[str, str], alone: bool) -> None:
    """Run a command to its end, from its newest checkpoint if it was interrupted.

    One that runs alone shows its progress. Raises KeyboardInterrupt if Ctrl-C has ended it.
    """
    resumed = run.output.suffix != ".json" and newest_checkpoint(run.output) is not None
    script, *rest = run.command()
    command = [sys.executable, ROOT / script, *rest, *(["--resume"] if resumed else [])]
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": None if alone else subprocess.PIPE}
    process = subprocess.run(command, **pipes, text=True, env=environment)
    minutes = (time.perf_counter() - start) / 60
    if run.minutes_file.parent.exists():
        earlier = resumed and run.minutes_file.exists()
        before = float(run.minutes_file.read_text()) if earlier else 0.0
        run.minutes_file.write_text(f"{before + minutes:.2f}\n")
    if process.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    reason = "" if alone else f": {process.stderr.strip()[-400:]}"
    require(process.returncode == 0, f"{run} failed{reason}")
    print(f"{minutes:5.1f} min  {run}", flush=True)


# ------------------------------------------------------------------------------------------------
# What an experiment consists of


@dataclass(frozen=True)
class Cell:
    """SFT, RL from it, and an evaluation of both. They give one row for each seed."""

    labels: Labels
    model: str  # B, F or FB
    rl: dict  # flags of train_grpo.py
    evaluation: dict | None = None  # flags of eval.py; None: the row is made of RL's log
    side: Literal["before", "after"] = "after"  # RL: the model that the row is about
    sft: dict = field(default_factory=dict)  # flags of train_sft.py
    rl_first: dict = field(default_factory=dict)  # flags of a run of RL before, if there is one

    @property
    def name(self) -> str:
        return ", ".join(map(str, self.labels.values()))

    def row(self, seed: int, evaluation: Run | None) -> dict:
        """Return eval.py's metrics in percent; 0 for an accuracy over no responses."""
        row = self.labels | {"seed": seed}
        if evaluation is None:
            return row
        found = read_json(evaluation.output)
        summary, overall = found[self.side], found[self.side]["overall"]
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

    def measured(self, rows: list[dict]) -> list[Cell]:
        """Return the cells that have rows; with --only others may have none."""
        return [cell for cell in self.cells if values(rows, "seed", **cell.labels)]

    def table(self, rows: list[dict]) -> str:
        """Return means and ranges over the seeds as Markdown, then the paper's numbers."""
        headings = [*self.columns]
        of_paper = max(map(len, self.paper.values()), default=0)
        head = ["", *headings, *(f"paper: {heading}" for heading in headings[:of_paper])]
        lines = []
        for cell in self.measured(rows):
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
        return bar_figure(rows, self.measured(rows), list(self.columns.values()), self.paper)


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
