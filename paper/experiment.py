"""Run an experiment's commands, each once and several side by side, and report their results."""

import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from lib.checkpoint import load_meta
from lib.flags import flag_name, read_json, require, user_errors, write_json
from lib.plots import save
from lib.run_dir import check_start, newest_checkpoint, read_log

ROOT = Path(__file__).parent.parent  # where the scripts lie
SCRIPTS = ("train_sft.py", "train_grpo.py", "eval.py")  # in the order in which they need one another
MODELS = {"B": "backward", "F": "forward", "FB": "mixed"}  # strategies in the SFT data
Verdict = tuple[str, str, list[bool]]  # a claim, what was found, whether it holds for each seed


@dataclass
class ReproduceConfig:
    experiment: list = field(default_factory=list)  # its name, or all
    scale: Literal["tiny"] = "tiny"  # the model made here from scratch, where no --model is named
    model: str = ""  # a pretrained model's folder or hub name, with the paper's recipe
    seeds: int = 1  # runs of each cell, with seeds 0, 1, ...
    jobs: int = 0  # commands side by side [0: one per core on the CPU, else one]
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
        return [self.script, *self.arguments, *flags]

    def __str__(self) -> str:
        return shlex.join(["python", *self.command()])

    def finished(self) -> bool:
        """Return whether its result is complete. Refuse one of other flags or another start."""
        if self.output.suffix == ".json":
            return self.output.exists() and self.output.read_text().endswith("\n}\n")  # not cut off
        newest = newest_checkpoint(self.output)
        meta = load_meta(newest) if newest else {}
        for name, now in self.flags.items():
            then = str(meta.get(name, now))
            message = f"{self.output} was made with {flag_name(name)} {then}, not {now}"
            require(then == now, f"{message}: move it away")
        check_start(self.output, meta)
        return bool(newest) and meta["update"] == meta["total"]

    @property
    def minutes_file(self) -> Path:
        """The file that keeps how many minutes it has taken so far."""
        return self.output.with_name(f"{self.output.name}.minutes")

    def result(self) -> dict:
        return read_json(self.output)

    def log(self) -> list[dict]:
        return read_log(self.output / "metrics.jsonl")


@dataclass(frozen=True)
class Cell:
    """One row of results for each seed: SFT, RL from it, and an evaluation of both models."""

    labels: dict[str, object]  # what tells its rows from others, such as model and stage
    model: str  # B, F or FB
    rl: dict  # flags of train_grpo.py
    evaluation: dict | None = None  # flags of eval.py; None: the row is made of the logs alone
    side: Literal["before", "after"] = "after"  # the row reports the model before or after RL
    sft: dict = field(default_factory=dict)  # flags of train_sft.py
    sft_from_scratch: dict = field(default_factory=dict)  # and without --model, before those


class CellRuns(NamedTuple):
    sft: Run
    rl: Run
    evaluation: Run | None


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
        """The folder of the results."""
        model = Path(self.config.model).name
        return Path("paper/results") / (f"{self.name}-{model}" if model else self.name)

    def add(self, script: str, output: Path, *arguments: str, **flags) -> Run:
        """Return the run that writes `output`: one run serves all the cells that need it."""
        texts = {name: str(value) for name, value in flags.items()}
        return self.runs.setdefault(output, Run(script, arguments, texts, output))

    def sft(self, model: str, seed: int, **flags) -> Run:
        """Add SFT on the strategies of B, F or FB."""
        scale = Path(self.config.model).name or self.config.scale
        out = Path("ckpt/reproduce") / scale / name_of(f"sft-{model}-{seed}", flags)
        if self.config.model:
            flags = {"model": self.config.model} | flags
        return self.add("train_sft.py", out, strategy=MODELS[model], seed=seed, **flags, out=out)

    def rl(self, init: Run, seed: int, **flags) -> Run:
        """Add RL from an SFT run."""
        out = init.output.with_name(name_of(f"{init.output.name}-rl", flags))
        return self.add("train_grpo.py", out, init=init.output, seed=seed, **flags, out=out)

    def compare(self, before: Run, after: Run, **flags) -> Run:
        """Add an evaluation of both on the same validation problems, at RL's temperature."""
        if self.config.model:
            flags["temperature"] = 0.7
        out = after.output / f"{name_of('compared', flags)}.json"
        return self.add("eval.py", out, str(before.output), str(after.output), **flags, json=out)

    def add_cell(self, cell: Cell, seed: int) -> CellRuns:
        sft_flags = cell.sft if self.config.model else cell.sft_from_scratch | cell.sft
        sft = self.sft(cell.model, seed, **sft_flags)
        rl = self.rl(sft, seed, **cell.rl)
        if cell.evaluation is None:
            return CellRuns(sft, rl, None)
        return CellRuns(sft, rl, self.compare(sft, rl, **cell.evaluation))

    def run(self) -> None:
        """Do what has not been done: all SFT, then all RL, then all evaluations."""
        n_cores = len(os.sched_getaffinity(0))
        jobs = self.config.jobs or (1 if torch.cuda.is_available() else n_cores)
        threads = str(max(1, n_cores // jobs))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        for script in SCRIPTS:
            of_script = [run for run in self.runs.values() if run.script == script]
            unfinished = [run for run in of_script if not run.finished()]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(lambda run: execute(run, environment), unfinished))

    def report(self, rows: list[dict], table: str, verdicts: list[Verdict], figure) -> None:
        """Print the table and the verdicts, and write them with the rows and the figure."""
        minutes_files = [run.minutes_file for run in self.runs.values()]
        minutes = sum(float(file.read_text()) for file in minutes_files if file.exists())
        summary = f"The commands, which took {minutes:.0f} minutes in all"
        commands = "\n".join(map(str, self.runs.values()))
        details = f"<details><summary>{summary}</summary>\n\n```\n{commands}\n```\n\n</details>\n"
        text = "\n\n".join([table, verdict_table(verdicts), details])
        result = {"seeds": self.config.seeds, "minutes": round(minutes, 1)}
        with user_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            result |= {"rows": rows, "claims": verdicts}
            write_json(self.folder / f"{self.name}.json", result)
            (self.folder / f"{self.name}.md").write_text(text)
        save(figure, self.folder / f"{self.name}.png")
        print(f"\n{text}\n{self.folder}")


def execute(run: Run, environment: dict[str, str]) -> None:
    """Run a command to its end, from its newest checkpoint if it was interrupted."""
    resumed = run.output.suffix != ".json" and newest_checkpoint(run.output) is not None
    script, *rest = run.command()
    command = [sys.executable, ROOT / script, *rest, *(["--resume"] if resumed else [])]
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    minutes = (time.perf_counter() - start) / 60
    if run.minutes_file.parent.exists():
        earlier = resumed and run.minutes_file.exists()
        before = float(run.minutes_file.read_text()) if earlier else 0.0
        run.minutes_file.write_text(f"{before + minutes:.2f}\n")
    require(process.returncode == 0, f"{run} failed: {process.stderr.strip()[-400:]}")
    print(f"{minutes:5.1f} min  {run}", flush=True)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdict_table(verdicts: list[Verdict]) -> str:
    """Format verdicts as Markdown; "in k of n seeds" where a claim holds for some seeds only."""

    def in_words(held: list[bool]) -> str:
        if all(held):
            return "yes"
        return f"**in {sum(held)} of {len(held)} seeds**" if any(held) else "**no**"

    rows = [[claim, found, in_words(held)] for claim, found, held in verdicts]
    return markdown(["the paper says", "found", "holds"], rows)
