"""The paper's experiments by name, from nothing to a table beside the paper's figures and a plot.

    python reproduce.py --list                     # what there is, and what it took when it was last run
    python reproduce.py table1                     # one seed
    python reproduce.py table1 --seeds 3
    python reproduce.py table1 --model models/smollm2

Every number comes from a command that is printed with the table; finished commands are not run again, and one that was
interrupted goes on where it stopped. On the CPU as many run side by side as there are cores, a thread each. Runs lie in
runs/reproduce, results in results/NAME: NAME.json, NAME.md, NAME.png.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch

from checkpoint import load_training
from data.finite_field import EVALUATION, FORWARD, INVERSION
from plot import COLOURS, draw_smoothly, new_figure, save
from run_folder import newest_checkpoint, read_log
from runtime import parse_flags, read_json, refusals, require, write_json

HERE = Path(__file__).parent
STRATEGIES = {"B": "backward", "F": "forward", "FB": "mixed"}  # what an SFT model was shown


@dataclass
class ReproduceConfig:
    experiment: list = field(default_factory=list)  # its name, or all
    scale: Literal["tiny"] = "tiny"  # the model made here from scratch, where no --model is named
    model: str = ""  # a pretrained model's folder or hub name, with the paper's recipe
    seeds: int = 1  # runs of each cell, with seeds 0, 1, ...
    jobs: int = 0  # commands side by side [0: one a core on the CPU, else one]
    list: bool = False  # say what there is


# ------------------------------------------------------------------------------------------------------------------
# Running commands


@dataclass(frozen=True)
class Run:
    """A command, and the folder or file in which it leaves its result."""

    script: str
    flags: tuple[str, ...]
    place: Path

    def __str__(self) -> str:
        return shlex.join(["python", self.script, *self.flags])

    def finished(self) -> bool:
        if self.place.suffix == ".json":
            return self.place.exists() and self.place.read_text().endswith("\n}\n")  # not cut off while it was written
        found = newest_checkpoint(self.place)
        training = load_training(found) if found else {}
        return bool(found) and training["update"] == training["total"]

    def result(self) -> dict:
        return read_json(self.place)

    def log(self) -> list[dict]:
        return read_log(self.place / "metrics.jsonl")


def name_of(what: str, flags: dict) -> str:
    return "-".join([what, *(f"{name}-{value}" for name, value in flags.items())])


@dataclass
class Lab:
    """The runs of an experiment: first they are named, then `run` does them, then their results are read."""

    name: str
    config: ReproduceConfig
    runs: dict[Path, Run] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seeds(self) -> range:
        return range(self.config.seeds)

    def add(self, script: str, place: Path, *positional: str, **flags) -> Run:
        told = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        return self.runs.setdefault(place, Run(script, (*positional, *told), place))

    def sft(self, model: str, seed: int, **flags) -> Run:
        """An SFT model that was shown the strategies of B, F or FB."""
        scale = Path(self.config.model).name or self.config.scale
        place = Path("runs") / "reproduce" / scale / name_of(f"sft-{model}-{seed}", flags)
        given = {"model": self.config.model} if self.config.model else {}
        return self.add("train_sft.py", place, strategy=STRATEGIES[model], seed=seed, **given, **flags, out=place)

    def rl(self, start: Run, seed: int, **flags) -> Run:
        place = start.place.with_name(name_of(f"{start.place.name}-rl", flags))
        return self.add("train_grpo.py", place, init=start.place, seed=seed, **flags, out=place)

    def compare(self, before: Run, after: Run, **flags) -> Run:
        """Both on the same validation problems."""
        place = after.place / f"{name_of('compared', flags)}.json"
        return self.add("eval.py", place, str(before.place), str(after.place), **flags, json=place)

    def cell(self, model: str, sft: dict, rl: dict, *compared: dict) -> list[tuple[Run, ...]]:
        """Of each seed: RL from an SFT model, and both on the same problems, once for each set of eval.py's flags."""
        cells = []
        for seed in self.seeds:
            start = self.sft(model, seed, **sft)
            run = self.rl(start, seed, **rl)
            cells.append((run, *(self.compare(start, run, **flags) for flags in compared)))
        return cells

    def run(self) -> None:
        """Do what has not been done, in the order SFT, RL, evaluation."""
        cores = 1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        jobs = self.config.jobs or cores
        threads = str(max(1, cores // jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}

        def do(run: Run) -> None:
            begun = newest_checkpoint(run.place) if run.place.suffix != ".json" else None
            command = [sys.executable, HERE / run.script, *run.flags, *(["--resume"] if begun else [])]
            clock = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            require(done.returncode == 0, f"{run} failed: {done.stderr.strip()[-400:]}")
            print(f"{(time.perf_counter() - clock) / 60:5.1f} min  {run}", flush=True)

        for script in ("train_sft.py", "train_grpo.py", "eval.py"):
            waiting = [run for run in self.runs.values() if run.script == script and not run.finished()]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(do, waiting))

    def report(self, rows: list[dict], claims: list[tuple[str, str, bool]], table: str, figure) -> None:
        """Write results/NAME; the time it took is kept from the run that did most."""
        model = Path(self.config.model).name
        folder = Path("results") / (f"{self.name}-{model}" if model else self.name)
        folder.mkdir(parents=True, exist_ok=True)
        known = folder / f"{self.name}.json"
        minutes = (time.perf_counter() - self.started) / 60
        before = read_json(known) if known.exists() else {}
        if before.get("seeds") == self.config.seeds:
            minutes = max(minutes, before["minutes"])
        with refusals():
            figures = {"seeds": self.config.seeds, "minutes": round(minutes, 1), "rows": rows, "claims": claims}
            write_json(known, figures)
        commands = "\n".join(map(str, self.runs.values()))
        head = f"<details><summary>The commands; {minutes:.0f} minutes for those not run before</summary>"
        verdicts = [[claim, found, "yes" if holds else "**no**"] for claim, found, holds in claims]
        verdicts = markdown(["the paper says", "found", "holds"], verdicts)
        text = "\n\n".join(filter(None, [table, verdicts, head, f"```\n{commands}\n```", "</details>\n"]))
        (folder / f"{self.name}.md").write_text(text)
        save(figure, folder / f"{self.name}.png")
        print(f"\n{text}\n{folder}")


def mean_and_range(values: list[float]) -> str:
    """In percent; the range of the seeds where there are several."""
    low, high = min(values), max(values)
    return f"{fmean(values):.1f}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def percent_of(summary: dict, kind: str | None = None, key: str = "pass@1") -> float:
    """A figure of eval.py's, of all problems or of a type, in percent; 0 for an accuracy that has no cases."""
    figures = summary["by_type"][kind] if kind else summary["overall"]
    return 100 * (figures[key] or 0.0)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------------------------
# Experiments


STAGES = ("SFT", "RL 2-5", "RL 6-9")
TYPES = (None, INVERSION, EVALUATION)
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


def draw_seeds(axis, logs: list[list[dict]], metric: str, number: int, label: str) -> None:
    """A curve for each seed, in one colour under one label."""
    for i, log in enumerate(logs):
        draw_smoothly(axis, log, metric, color=f"C{number}", label=label if i == 0 else None, linewidth=1.3)


def table1(lab: Lab) -> None:
    """SFT on backward, forward or both strategies, then RL on 2-5 or 6-9 steps: pass@1 on 6-9 steps"""
    cells = {
        (model, rl): lab.cell(model, {}, {"difficulty": rl}, {"difficulty": "hard"})
        for model in STRATEGIES
        for rl in ("easy", "hard")
    }
    lab.run()
    rows, summaries = [], {}
    for model in STRATEGIES:
        for seed in lab.seeds:
            easy, hard = (cells[model, rl][seed][1].result() for rl in ("easy", "hard"))
            for stage, summary in zip(STAGES, (hard["before"], easy["after"], hard["after"])):
                summaries.setdefault((model, stage), []).append(summary)
                named = {kind or "all": percent_of(summary, kind) for kind in TYPES}
                named["fit_share"] = percent_of(summary, key="fit_share")
                rows.append({"model": model, "stage": stage, "seed": seed, **named})

    def values(model: str, stage: str, kind: str | None = None, key: str = "pass@1") -> list[float]:
        return [percent_of(summary, kind, key) for summary in summaries[model, stage]]

    def found(model: str, stages: tuple[str, ...], kind: str | None = None, key: str = "pass@1") -> str:
        return " -> ".join(mean_and_range(values(model, stage, kind, key)) for stage in stages)

    def mean(*cell) -> float:
        return fmean(values(*cell))

    given = "accuracy_given_fit"
    before_after = (STAGES[0], STAGES[2])
    claims = [
        (
            "FB with RL on 6-9 steps is the best of the nine, near 100% on both types",
            found("FB", before_after),
            mean("FB", "RL 6-9") == max(mean(*cell) for cell in PAPER_TABLE1)
            and min(mean("FB", "RL 6-9", kind) for kind in TYPES) > 90,
        ),
        (
            "selection: the share of the fitting strategy goes from about half to above 95%",
            found("FB", before_after, None, "fit_share"),
            35 < mean("FB", "SFT", None, "fit_share") < 65 and mean("FB", "RL 6-9", None, "fit_share") > 95,
        ),
        (
            "improvement needs harder data: accuracy given the fitting strategy rises by RL on 6-9, not by RL on 2-5",
            f"{found('FB', before_after, None, given)}; RL 2-5: {found('FB', ('RL 2-5',), None, given)}",
            mean("FB", "RL 6-9", None, given) > mean("FB", "SFT", None, given) + 5
            and mean("FB", "RL 2-5", None, given) < mean("FB", "SFT", None, given) + 5,
        ),
        ("FB gains by RL on 2-5", found("FB", STAGES[:2]), mean("FB", "RL 2-5") > mean("FB", "SFT")),
    ]
    for model, fitting, other in (("F", EVALUATION, INVERSION), ("B", INVERSION, EVALUATION)):
        claims += [
            (
                f"{model}: no new strategy, {other} stays within chance (9%)",
                found(model, STAGES, other),
                max(mean(model, stage, other) for stage in STAGES) < 15,
            ),
            (
                f"{model} improves on {fitting} by RL on 6-9",
                found(model, before_after, fitting),
                mean(model, "RL 6-9", fitting) > mean(model, "SFT", fitting),
            ),
            (
                f"{model} does not improve on {fitting} by RL on 2-5",
                found(model, STAGES[:2], fitting),
                mean(model, "RL 2-5", fitting) <= mean(model, "SFT", fitting),
            ),
        ]
    head = ["model", *("all", "inversion", "evaluation"), *("paper: all", "inversion", "evaluation")]
    table = [
        [f"{model}, {stage}", *(mean_and_range(values(model, stage, kind)) for kind in TYPES), *map(str, paper)]
        for (model, stage), paper in PAPER_TABLE1.items()
    ]
    text = f"Pass@1 in % on 6-9 steps, {lab.config.seeds} seed(s), mean and range:\n\n{markdown(head, table)}"
    lab.report(rows, claims, text, table1_figure(rows))


def table1_figure(rows: list[dict]):
    """Accuracy by type of the nine models, ours as bars with a dot a seed, the paper's as lines."""
    figure, axes = new_figure(11, 3.6, 1, 3)
    for axis, model in zip(axes, STRATEGIES):
        for i, kind in enumerate((EVALUATION, INVERSION)):
            for j, stage in enumerate(STAGES):
                found = [r[kind] for r in rows if (r["model"], r["stage"]) == (model, stage)]
                x, paper = j + 0.4 * i - 0.2, PAPER_TABLE1[model, stage][2 - i]
                axis.bar(x, fmean(found), 0.36, color=COLOURS[kind], alpha=0.75, label=kind if j == 0 else None)
                axis.plot([x] * len(found), found, "k.", markersize=4)
                label = "paper" if i == j == 0 else None
                axis.plot([x - 0.18, x + 0.18], [paper, paper], "k-", linewidth=1.5, label=label)
        axis.set(title=f"SFT on {STRATEGIES[model]}", xticks=range(3), ylim=(0, 102))
        axis.set_xticklabels(STAGES)
    axes[0].set_ylabel("pass@1 on 6-9 steps, %")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def mean_log(logs: list[list[dict]], metrics) -> list[dict]:
    """The mean of the seeds, update by update, where any has the metric."""
    rows = []
    for same in zip(*logs):
        values = {metric: [row[metric] for row in same if row.get(metric) is not None] for metric in metrics}
        rows.append({"update": same[0]["update"]} | {metric: fmean(found) for metric, found in values.items() if found})
    return rows


def dynamics(lab: Lab) -> None:
    """The course of RL on 6-9 steps: accuracy by type and by number of steps (figures 2-4; runs of table1)"""
    cells = {model: lab.cell(model, {}, {"difficulty": "hard"}) for model in STRATEGIES}
    lab.run()
    logs = {model: [run.log() for (run,) in runs] for model, runs in cells.items()}

    def last(model: str, kind: str) -> float:
        """Mean accuracy over the last tenth of the updates."""
        return 100 * fmean(row[f"accuracy/{kind}"] for log in logs[model] for row in log[-len(log) // 10 :])

    found = {(model, kind): last(model, kind) for model in STRATEGIES for kind in (EVALUATION, INVERSION)}
    both = {model: min(found[model, kind] for kind in (EVALUATION, INVERSION)) for model in STRATEGIES}
    text = ", ".join(f"{model} {both[model]:.1f}" for model in STRATEGIES)
    claims = [
        ("only FB approaches 100% on both types (the weaker type's reward, last tenth of the updates)", text,
         both["FB"] > 90 > 20 > max(both["B"], both["F"])),
    ]  # fmt: skip
    figure, axes = new_figure(13, 6.5, 2, 3)
    for column, model in enumerate(STRATEGIES):
        steps = sorted(int(key.split("/")[1]) for key in logs[model][0][0] if key.startswith("accuracy_at_steps/"))
        above = {kind: f"accuracy/{kind}" for kind in (EVALUATION, INVERSION)}
        below = {f"{n} steps": f"accuracy_at_steps/{n}" for n in steps}
        for row, metrics in enumerate((above, below)):
            axis = axes[3 * row + column]
            shown = logs[model] if row == 0 else [mean_log(logs[model], metrics.values())]
            for i, (label, metric) in enumerate(metrics.items()):
                draw_seeds(axis, shown, metric, i, label)
            axis.set(ylim=(0, 1.02), title=f"SFT on {STRATEGIES[model]}" if row == 0 else "")
            axis.set_xlabel("update" if row == 1 else "")
    axes[0].set_ylabel("accuracy by type")
    axes[3].set_ylabel("by number of steps, mean of the seeds")
    for axis in (axes[0], axes[3]):
        axis.legend(fontsize=8, frameon=False)
    rows = [{"model": model, "type": kind, "last": value} for (model, kind), value in found.items()]
    lab.report(rows, claims, "", figure)


def amplification(lab: Lab) -> None:
    """RL on 50, 75 and 90% evaluation problems: the share of forward responses follows the data"""
    hard = {"difficulty": "hard"}
    flags = {0.5: {}, 0.75: {"evaluation_share": 0.75}, 0.9: {"evaluation_share": 0.9}}
    cells = {share: lab.cell("FB", {}, hard | given, hard) for share, given in flags.items()}
    lab.run()
    rows, texts = [], []
    names = ("stream", "learning", "balanced")
    for share, runs in cells.items():
        for run, comparison in runs:
            log = with_both_types(run)
            found = {
                "stream": fmean(forward_share(row, share) for row in log[-len(log) // 10 :]),
                "learning": fmean(forward_share(row, 0.5) for row in log[15:25]),
                "balanced": comparison.result()["after"]["overall"]["forward_share"],
            }
            rows.append({"evaluation_share": share} | {name: 100 * value for name, value in found.items()})
        of_share = [row for row in rows if row["evaluation_share"] == share]
        texts.append([f"{share:.0%}", *(mean_and_range([row[name] for row in of_share]) for name in names)])

    def means(name: str) -> list[float]:
        return [fmean(row[name] for row in rows if row["evaluation_share"] == share) for share in cells]

    def rising(name: str) -> tuple[str, bool]:
        low, middle, high = means(name)
        return ", ".join(f"{x:.1f}" for x in means(name)), low + 2 < middle < high - 2

    near = all(abs(found - 100 * share) < 6 for found, share in zip(means("stream"), cells))
    claims = [
        ("the share of forward responses in the RL stream follows the data: 50, 75, 90%", rising("stream")[0], near),
        ("and rises with it on balanced validation data, after RL", *rising("balanced")),
        ("(ours) or at least on the way, while RL teaches the choice (updates 16-25)", *rising("learning")),
    ]
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, (share, runs) in enumerate(cells.items()):
        logs = [with_both_types(run) for run, _ in runs]
        logs = [[row | {"forward": forward_share(row, share)} for row in log] for log in logs]
        draw_seeds(axis, logs, "forward", i, f"{share:.0%} evaluation")
        axis.axhline(share, color=f"C{i}", linewidth=0.8, linestyle=":")
    axis.set(xlabel="update", ylabel="share of forward responses in the RL stream", ylim=(0, 1))
    axis.legend(frameon=False)
    table = markdown(
        [
            "evaluation in the RL data",
            "forward in the stream, %",
            "the same at 50:50, updates 16-25",
            "validation, after RL",
        ],
        texts,
    )
    lab.report(rows, claims, table, figure)


def with_both_types(run: Run) -> list[dict]:
    """The rows of the log, but for updates whose few problems were all of one type."""
    return [row for row in run.log() if {f"{FORWARD}/{EVALUATION}", f"{FORWARD}/{INVERSION}"} <= row.keys()]


def forward_share(row: dict, evaluation_share: float) -> float:
    """The share of forward responses in an update, if this share of its problems were evaluation."""
    evaluation, inversion = (row[f"{FORWARD}/{kind}"] for kind in (EVALUATION, INVERSION))
    return evaluation_share * evaluation + (1 - evaluation_share) * inversion


COMPOSITION_STARTS = {"single parts": {}, "1-2 parts": {"parts": "1-2"}, "1-3 parts": {"parts": "1-3"}}


def composition(lab: Lab) -> None:
    """RL on compositions of 3-5 parts, from SFT on single parts, on up to two (the paper's) and on up to three"""
    trained, longer = ({"difficulty": "easy", "parts": parts} for parts in ("3-5", "4-5"))
    cells = {name: lab.cell("FB", flags, trained, trained, longer) for name, flags in COMPOSITION_STARTS.items()}
    lab.run()
    rows, table, change = [], [], {}
    for name, runs in cells.items():
        columns = []
        for parts, number in (("3-5", 1), ("4-5", 2)):
            results = [run[number].result() for run in runs]
            pair = [[percent_of(result[side]) for result in results] for side in ("before", "after")]
            rows.append({"sft": name, "parts": parts, "before": pair[0], "after": pair[1]})
            columns += map(mean_and_range, pair)
            change[name, parts] = fmean(pair[1]) - fmean(pair[0])
        table.append([name, *columns])

    def found(cell: tuple[str, str]) -> str:
        return f"{cell[0]}: {change[cell]:+.1f}"

    alone, paper, more = ("single parts", "3-5"), ("1-2 parts", "3-5"), ("1-3 parts", "4-5")
    claims = [
        ("RL learns 3-5 parts if SFT held compositions of two", found(paper), change[paper] > 10),
        ("and not if it held none", found(alone), change[alone] < 5),
        ("(ours) a weaker form: it learns 4-5 parts if SFT held up to three", found(more), change[more] > 10),
    ]
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, (name, runs) in enumerate(cells.items()):
        draw_seeds(axis, [run.log() for run, *_ in runs], "reward", i, name)
    axis.set(xlabel="update", ylabel="reward on compositions of 3-5 parts", ylim=(0, 1.02))
    axis.legend(title="SFT on", frameon=False)
    head = ["SFT on", "3-5 parts: SFT", "after RL", "4-5 parts: SFT", "after RL"]
    lab.report(rows, claims, markdown(head, table), figure)


def gf13(lab: Lab) -> None:
    """The three SFT models in GF(13), then RL on 6-9 steps"""
    rl, compared = {"difficulty": "hard", "field": 13}, ({"difficulty": "easy"}, {"difficulty": "hard"})
    cells = {model: lab.cell(model, {"field": 13}, rl, *compared) for model in STRATEGIES}
    lab.run()
    rows, values = [], {}
    for model, runs in cells.items():
        for seed, (_, easy, hard) in enumerate(runs):
            sides = {"SFT, 2-5 steps": easy.result()["before"], "SFT": hard.result()["before"]}
            for stage, summary in {**sides, "RL 6-9": hard.result()["after"]}.items():
                row = [percent_of(summary, kind) for kind in TYPES]
                values.setdefault((model, stage), []).append(row)
                rows.append({"model": model, "stage": stage, "seed": seed} | dict(zip(("all", *TYPES[1:]), row)))

    def of_all(stage: str) -> dict[str, float]:
        return {model: fmean(row[0] for row in values[model, stage]) for model in STRATEGIES}

    easy, final = of_all("SFT, 2-5 steps"), of_all("RL 6-9")
    claims = [
        ("all three SFT models reach 70-80% on 2-5 steps", ", ".join(f"{m} {x:.1f}" for m, x in easy.items()),
         all(70 <= x <= 80 for x in easy.values())),
        ("after RL on 6-9 steps only FB is near perfect", ", ".join(f"{m} {x:.1f}" for m, x in final.items()),
         final["FB"] > 90 > 70 > max(final["B"], final["F"])),
    ]  # fmt: skip
    table = [
        [f"{model}, {stage}", *(mean_and_range([row[i] for row in found]) for i in range(3))]
        for (model, stage), found in values.items()
    ]
    text = markdown(["model", "all", "inversion", "evaluation"], table)
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, kind in enumerate((EVALUATION, INVERSION)):
        heights = [fmean(row[2 - i] for row in values[model, "RL 6-9"]) for model in STRATEGIES]
        axis.bar([j + 0.4 * i - 0.2 for j in range(3)], heights, 0.36, color=COLOURS[kind], label=kind)
    axis.set(xticks=range(3), ylabel="pass@1 on 6-9 steps after RL, GF(13), %", ylim=(0, 102))
    axis.set_xticklabels([f"SFT on {STRATEGIES[model]}" for model in STRATEGIES])
    axis.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    lab.report(rows, claims, text, figure)


def extreme(lab: Lab) -> None:
    """FB reinforced on 6-15 steps"""
    runs = lab.cell("FB", {}, {"difficulty": "extreme"}, {"difficulty": "extreme"})
    lab.run()
    results = [comparison.result() for _, comparison in runs]
    before, after = ([percent_of(result[side]) for result in results] for side in ("before", "after"))
    claims = [("FB still improves clearly on 6-15 steps", f"{mean_and_range(before)} -> {mean_and_range(after)}",
               fmean(after) > fmean(before) + 10)]  # fmt: skip
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for side, colour in (("before", "0.6"), ("after", "tab:blue")):
        for i, result in enumerate(results):
            cells = result[side]["by_steps"]
            label = {"before": "SFT on 2-5 steps", "after": "RL on 6-15"}[side] if i == 0 else None
            axis.plot([int(n) for n in cells], [c["pass@1"] for c in cells.values()], "o-", color=colour, label=label)
    axis.set(xlabel="number of steps", ylabel="pass@1", ylim=(0, 1.02))
    axis.legend(frameon=False)
    rows = [{"seed": seed, "before": b, "after": a} for seed, b, a in zip(lab.seeds, before, after)]
    lab.report(rows, claims, "", figure)


ROBUSTNESS = {  # RL flags, and the paper's final accuracy of B, F and FB
    "default": ({}, (53, 60, 97)),
    "beta 0.1": ({"beta": 0.1}, (53, 58, 96)),
    "group 16": ({"group": 16}, (58, 51, 98)),
    "group 16, beta 0.1": ({"group": 16, "beta": 0.1}, (53, 52, 97)),
}


def robustness(lab: Lab) -> None:
    """Other KL weights and group sizes: the final accuracy of B, F and FB on 6-9 steps"""
    hard = {"difficulty": "hard"}
    cells = {
        (name, model): lab.cell(model, {}, hard | flags, hard)
        for name, (flags, _) in ROBUSTNESS.items()
        for model in STRATEGIES
    }
    lab.run()
    values = {key: [percent_of(compared.result()["after"]) for _, compared in runs] for key, runs in cells.items()}
    final = {key: fmean(found) for key, found in values.items()}
    holds = all(final[name, "FB"] > max(final[name, "B"], final[name, "F"]) + 20 for name in ROBUSTNESS)
    found = ", ".join(f"{name}: {final[name, 'FB']:.1f}" for name in ROBUSTNESS)
    claims = [("FB stays far ahead of B and F whatever the setting", found, holds)]
    table = [
        [name, *(mean_and_range(values[name, model]) for model in STRATEGIES), " / ".join(map(str, paper))]
        for name, (_, paper) in ROBUSTNESS.items()
    ]
    text = markdown(["RL", *STRATEGIES, "paper: B / F / FB"], table)
    figure, (axis,) = new_figure(7, 4, 1, 1)
    for i, model in enumerate(STRATEGIES):
        axis.bar([j + 0.27 * (i - 1) for j in range(4)], [final[name, model] for name in ROBUSTNESS], 0.25, label=model)
    axis.set(xticks=range(4), ylabel="pass@1 on 6-9 steps after RL, %", ylim=(0, 102))
    axis.set_xticklabels(ROBUSTNESS)
    axis.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    rows = [{"rl": name, "model": model, "after": found} for (name, model), found in values.items()]
    lab.report(rows, claims, text, figure)


EXPERIMENTS: dict[str, Callable[[Lab], None]] = {
    function.__name__: function
    for function in (table1, dynamics, amplification, composition, gf13, extreme, robustness)
}


def main(config: ReproduceConfig) -> None:
    if config.list:
        for name, function in EXPERIMENTS.items():
            known = Path("results") / name / f"{name}.json"
            last = read_json(known) if known.exists() else {}
            cost = f"{last['minutes']:.0f} min for {last['seeds']} seed(s)" if last else "not run yet"
            print(f"{name:14} {function.__doc__} [{cost}]")
        return
    names = list(EXPERIMENTS) if config.experiment == ["all"] else config.experiment
    for name in names:
        require(name in EXPERIMENTS, f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)} and all")
    require(bool(names), f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    require(config.seeds >= 1, "--seeds must be at least 1")
    require(config.jobs >= 0, "--jobs must not be negative")
    for name in names:
        EXPERIMENTS[name](Lab(name, config))


if __name__ == "__main__":
    main(parse_flags(ReproduceConfig, __doc__, positional="experiment"))
