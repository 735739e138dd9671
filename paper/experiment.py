"""The commands of an experiment, run once and in parallel, and the results that they leave."""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from lib.checkpoint import load_meta
from lib.flags import read_json, require, user_errors, write_json
from lib.plots import save
from lib.run_dir import check_start, newest_checkpoint, read_log

HERE = Path(__file__).parent.parent  # where the scripts lie
MODELS = {"B": "backward", "F": "forward", "FB": "mixed"}  # what an SFT model was shown
Claim = tuple[
    str, str, list[bool]
]  # what the paper says, what was found, and whether it holds for each seed


@dataclass
class ReproduceConfig:
    experiment: list = field(default_factory=list)  # its name, or all
    scale: Literal["tiny"] = "tiny"  # the model made here from scratch, where no --model is named
    model: str = ""  # a pretrained model's folder or hub name, with the paper's recipe
    seeds: int = 1  # runs of each cell, with seeds 0, 1, ...
    jobs: int = 0  # commands side by side [0: one a core on the CPU, else one]
    list: bool = False  # say what there is


@dataclass(frozen=True)
class Run:
    """A command, and the folder or file in which it leaves its result."""

    script: str
    arguments: tuple[str, ...]
    flags: dict[str, str]
    place: Path

    def command(self) -> list[str]:
        told = [
            word
            for name, value in self.flags.items()
            for word in (f"--{name.replace('_', '-')}", value)
        ]
        return [self.script, *self.arguments, *told]

    def __str__(self) -> str:
        return shlex.join(["python", *self.command()])

    def finished(self) -> bool:
        """Whether its result is there, whole. Refuses a run that was made with other flags or from another start."""
        if self.place.suffix == ".json":
            return self.place.exists() and self.place.read_text().endswith(
                "\n}\n"
            )  # not cut off while it was written
        found = newest_checkpoint(self.place)
        training = load_meta(found) if found else {}
        for name, value in self.flags.items():
            then = str(training.get(name, value))
            require(
                then == value,
                f"{self.place} was made with --{name} {then}, not {value}: move it away",
            )
        check_start(self.place, training)
        return bool(found) and training["update"] == training["total"]

    @property
    def minutes(self) -> Path:
        """Where the time that it has taken so far is kept."""
        return self.place.with_name(f"{self.place.name}.minutes")

    def result(self) -> dict:
        return read_json(self.place)

    def log(self) -> list[dict]:
        return read_log(self.place / "metrics.jsonl")


def name_of(what: str, flags: dict) -> str:
    return "-".join([what, *(f"{name}-{value}" for name, value in flags.items())])


@dataclass
class Experiment:
    """The runs of an experiment: first they are named, then `run` does them, then their results are read."""

    name: str
    config: ReproduceConfig
    runs: dict[Path, Run] = field(default_factory=dict)

    @property
    def seeds(self) -> range:
        return range(self.config.seeds)

    @property
    def jobs(self) -> int:
        return self.config.jobs or (
            1 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        )

    def add(self, script: str, place: Path, *arguments: str, **flags) -> Run:
        told = {name: str(value) for name, value in flags.items()}
        return self.runs.setdefault(place, Run(script, arguments, told, place))

    def sft(self, model: str, seed: int, **flags) -> Run:
        """An SFT model that was shown the strategies of B, F or FB."""
        scale = Path(self.config.model).name or self.config.scale
        place = Path("ckpt") / "reproduce" / scale / name_of(f"sft-{model}-{seed}", flags)
        given = {"model": self.config.model} if self.config.model else {}
        return self.add(
            "train_sft.py", place, strategy=MODELS[model], seed=seed, **given, **flags, out=place
        )

    def rl(self, start: Run, seed: int, **flags) -> Run:
        place = start.place.with_name(name_of(f"{start.place.name}-rl", flags))
        return self.add("train_grpo.py", place, init=start.place, seed=seed, **flags, out=place)

    def compare(self, before: Run, after: Run, **flags) -> Run:
        """Both on the same validation problems, at the temperature of RL."""
        flags |= {"temperature": 0.7} if self.config.model else {}
        place = after.place / f"{name_of('compared', flags)}.json"
        return self.add("eval.py", place, str(before.place), str(after.place), **flags, json=place)

    def cell(self, model: str, sft: dict, rl: dict, *compared: dict) -> list[tuple[Run, ...]]:
        """Of each seed: SFT, RL from it, and both on the same problems, once for each set of eval.py's flags."""
        cells = []
        for seed in self.seeds:
            start = self.sft(model, seed, **sft)
            run = self.rl(start, seed, **rl)
            cells.append((start, run, *(self.compare(start, run, **flags) for flags in compared)))
        return cells

    def run(self) -> None:
        """Do what has not been done, in the order SFT, RL, evaluation."""
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}

        def do(run: Run) -> None:
            begun = newest_checkpoint(run.place) if run.place.suffix != ".json" else None
            script, *rest = run.command()
            command = [sys.executable, HERE / script, *rest, *(["--resume"] if begun else [])]
            clock = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            minutes = (time.perf_counter() - clock) / 60
            if run.minutes.parent.exists():
                before = float(run.minutes.read_text()) if begun and run.minutes.exists() else 0.0
                run.minutes.write_text(f"{before + minutes:.2f}\n")
            require(done.returncode == 0, f"{run} failed: {done.stderr.strip()[-400:]}")
            print(f"{minutes:5.1f} min  {run}", flush=True)

        for script in ("train_sft.py", "train_grpo.py", "eval.py"):
            waiting = [
                run for run in self.runs.values() if run.script == script and not run.finished()
            ]
            with ThreadPoolExecutor(self.jobs) as pool:
                list(pool.map(do, waiting))

    @property
    def folder(self) -> Path:
        """Of the results."""
        model = Path(self.config.model).name
        return Path("paper/results") / (f"{self.name}-{model}" if model else self.name)

    def report(self, rows: list[dict], table: str, claims: list[Claim], figure) -> None:
        """Print the table and the verdicts, and write paper/results/NAME."""
        took = [
            float(run.minutes.read_text()) for run in self.runs.values() if run.minutes.exists()
        ]
        minutes = round(sum(took), 1)
        commands = "\n".join(map(str, self.runs.values()))
        head = f"<details><summary>The commands, which took {minutes:.0f} minutes in all</summary>"
        text = "\n\n".join([table, verdicts(claims), head, f"```\n{commands}\n```", "</details>\n"])
        with user_errors():
            self.folder.mkdir(prompt_index=True, exist_ok=True)
            figures = {
                "seeds": self.config.seeds,
                "minutes": minutes,
                "rows": rows,
                "claims": claims,
            }
            write_json(self.folder / f"{self.name}.json", figures)
            (self.folder / f"{self.name}.md").write_text(text)
        save(figure, self.folder / f"{self.name}.png")
        print(f"\n{text}\n{self.folder}")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts(claims: list[Claim]) -> str:
    """Return a Markdown table of claims; "in k of n seeds" where one holds only in some."""

    def verdict(held: list[bool]) -> str:
        return (
            "yes"
            if all(held)
            else f"**in {sum(held)} of {len(held)} seeds**"
            if any(held)
            else "**no**"
        )

    return markdown(
        ["the paper says", "found", "holds"],
        [[claim, found, verdict(held)] for claim, found, held in claims],
    )
