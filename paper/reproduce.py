"""Reproduce the paper's experiments: run their commands and hold the results against the paper's.

    python -m paper.reproduce --list                # the experiments, and how long they took last
    python -m paper.reproduce table1                # one seed
    python -m paper.reproduce table1 --seeds 3
    python -m paper.reproduce table1 --model models/smollm2
    python -m paper.reproduce table1 --model models/smollm2 --laptop --only FB    # on a laptop

Every number comes from a command that is printed below the table. Finished commands are not run
again, and one that Ctrl-C has interrupted resumes. Commands of the tiny model run side by side on
the CPU, one thread each; those of another have all cores, one after the other. Runs lie in
ckpt/reproduce, results in paper/results/NAME or NAME-MODEL (.json, .md and .png), which are written
at the end, for each experiment whose commands have all finished.

The experiments are in paper/plans.py, what they consist of in paper/experiment.py.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import torch

import train_grpo
import train_sft
from lib.checkpoint import find_start, load_meta, newest_checkpoint
from lib.flags import (
    flag_name,
    parse_flags,
    quiet_pipes,
    read_json,
    require,
    require_min,
    set_missing,
    user_errors,
    warn,
    write_json,
)
from lib.limits import core_limit
from lib.plots import save
from lib.run_dir import changed_flags, read_log
from paper.experiment import MODELS, Cell, Plan, verdict_table
from paper.plans import EXPERIMENTS

ROOT = Path(__file__).parent.parent  # where the scripts lie


@dataclass
class ReproduceConfig:
    experiment: list = field(default_factory=list)  # its name, or all
    model: str = ""  # a pretrained model's folder or hub name, with the paper's recipe [tiny]
    laptop: bool = False  # train --model with --laptop, and evaluate it on 128 problems
    only: str = ""  # B, F or FB: run its commands and report its rows alone
    seeds: int = 1  # runs of each cell, with seeds 0, 1, ...
    jobs: int = 0  # commands side by side [0: of the tiny model on the CPU one per core, else one]
    list: bool = False  # list the experiments


@dataclass(frozen=True)
class Run:
    """A command, and the folder or JSON file that holds its result."""

    script: str
    arguments: tuple[str, ...]
    flags: dict[str, object]
    output: Path
    tiny: bool  # whether it is about the tiny model

    def command(self) -> list[str]:
        flags = [x for name, value in self.flags.items() for x in (flag_name(name), str(value))]
        flags = [word for word in flags if word != "True"]  # --laptop takes no value
        return [self.script, *self.arguments, *flags]

    def __str__(self) -> str:
        return shlex.join(["python", *self.command()])

    @property
    def reads(self) -> set[Path]:
        """What other commands write for it: the start of RL, the checkpoints of an evaluation."""
        return {Path(x) for x in (*self.arguments, self.flags.get("init", "")) if x}

    def settings(self) -> train_sft.SftConfig | train_grpo.GrpoConfig:
        """Return all flags of a training command, its defaults included."""
        if self.script == "train_sft.py":
            return train_sft.fill_defaults(train_sft.SftConfig(**self.flags), self.tiny)
        config = train_grpo.GrpoConfig(**self.flags)
        set_missing(config, train_grpo.LAPTOP if config.laptop else train_grpo.USUAL)
        return train_grpo.fill_defaults(config, self.tiny)

    def is_another(self, meta: dict) -> str:
        """Say why a checkpoint in its folder was not made by this command; "" if it was."""
        if changed := changed_flags(meta, self.settings()):
            flag, then, now = changed[0]
            return f"{self.output} was made with {flag} {then}, not {now}"
        if "init_sha256" in meta and find_start(self.output, meta) is None:
            return f"{self.output} started from weights that are gone from {meta['init_from']}"
        return ""

    def finished(self) -> bool:
        """Return whether its result is complete; refuse that of another command."""
        if self.output.suffix == ".json":
            return self.output.exists() and self.output.read_text().endswith("\n}\n")  # not cut off
        if (newest := newest_checkpoint(self.output)) is None:
            return False
        meta = load_meta(newest)
        another = self.is_another(meta)
        require(not another, f"{another}: move it away")
        return meta["update"] == meta["total"]

    @property
    def minutes_file(self) -> Path:
        """The file that keeps how many minutes it has taken so far."""
        return self.output.with_name(f"{self.output.name}.minutes")


def name_of(what: str, flags: dict) -> str:
    return "-".join([what, *(f"{name}-{value}" for name, value in flags.items())])


@dataclass
class Experiment:
    """The runs of an experiment: add all that it needs, have them run, then report on them."""

    name: str
    config: ReproduceConfig
    runs: dict[Path, Run] = field(default_factory=dict)
    planned: list[tuple[Cell, int, Run, Run]] = field(default_factory=list)  # seed, RL, evaluation

    @property
    def plan(self) -> Plan:
        plan, only = EXPERIMENTS[self.name], self.config.only
        return replace(plan, cells=[cell for cell in plan.cells if only in ("", cell.model)])

    @property
    def folder(self) -> Path:
        model = Path(self.config.model).name
        return Path("paper/results") / (f"{self.name}-{model}" if model else self.name)

    def add(self, script: str, output: Path, *arguments: str, **flags) -> Run:
        """Return the run that writes `output`: one run serves all the cells that need it."""
        flags = {name: str(x) if isinstance(x, Path) else x for name, x in flags.items()}
        run = Run(script, arguments, flags, output, tiny=not self.config.model)
        return self.runs.setdefault(output, run)

    def sft(self, model: str, seed: int, **flags) -> Run:
        """Add SFT on the strategies of B, F or FB."""
        name = name_of(f"sft-{model}-{seed}", flags)
        out = Path("ckpt/reproduce") / (Path(self.config.model).name or "tiny") / name
        if self.config.model:
            laptop = {"laptop": True} if self.config.laptop else {}
            epochs = {"epochs": 8} if laptop and "updates" not in flags else {}
            flags = {"model": self.config.model} | laptop | epochs | flags
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

    def add_cells(self) -> None:
        """Add all runs of the plan's cells, for each seed."""
        if not self.plan.cells:
            print(f"{self.name} trains no model {self.config.only}")
        for cell, seed in product(self.plan.cells, range(self.config.seeds)):
            sft = self.sft(cell.model, seed, **cell.sft)
            start = self.rl(sft, seed, **cell.rl_first) if cell.rl_first else sft
            rl = self.rl(start, seed, **cell.rl)
            evaluation = self.compare(sft, rl, seed, **cell.evaluation)
            self.planned.append((cell, seed, rl, evaluation))

    def report(self) -> None:
        """Print the table and the verdicts, and write them with the rows and the figure."""
        plan, rows, drawn = self.plan, [], []
        for cell, seed, rl, evaluation in self.planned:
            row = cell.row(seed, read_json(evaluation.output))
            log = read_log(rl.output / "metrics.jsonl")
            rows.append(row | (plan.measure(cell, log) if plan.measure else {}))
            drawn.append(rows[-1] | {"log": log})
        claims = [claim for claim in plan.claims if claim.has_rows(rows, self.config.seeds)]
        verdicts = [claim.verdict(rows) for claim in claims]
        minutes_files = [run.minutes_file for run in self.runs.values()]
        minutes = None  # known if all commands were run here
        if all(file.exists() for file in minutes_files):
            minutes = round(sum(float(file.read_text()) for file in minutes_files), 1)
        took = "" if minutes is None else f", which took {minutes:.0f} minutes in all"
        commands = "\n".join(map(str, self.runs.values()))
        details = f"<details><summary>The commands{took}</summary>"
        details += f"\n\n```\n{commands}\n```\n\n</details>\n"
        text = "\n\n".join([plan.table(rows), verdict_table(verdicts), details])
        result = {"seeds": self.config.seeds, "minutes": minutes}
        result |= {"rows": rows, "claims": verdicts}
        with user_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / f"{self.name}.json", result)
            (self.folder / f"{self.name}.md").write_text(text)
        save(plan.draw(drawn), self.folder / f"{self.name}.png")
        print(f"\n{text}\n{self.folder}")


def run_commands(left: list[Run], config: ReproduceConfig) -> None:
    """Say which commands are left, and run each of them once what it reads is there."""
    n_cores = core_limit()
    large = config.model or torch.cuda.is_available()
    jobs = config.jobs or (1 if large else n_cores)
    threads = str(max(1, n_cores // jobs))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
    print(f"{len(left)} commands are left", *left, sep="\n", flush=True)
    waiting, running = [*left], {}
    pool = ThreadPoolExecutor(jobs)
    try:
        while waiting or running:
            to_come = {run.output for run in (*waiting, *running.values())}
            ready = [run for run in waiting if not to_come & run.reads]
            free = jobs - len(running)
            for run in ready[:free]:  # no more, so that nothing begins after a failure
                running[pool.submit(execute, run, environment, jobs == 1)] = run
                waiting.remove(run)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                done.result()
                del running[done]
    except KeyboardInterrupt:  # a terminal sends it to the commands, too
        warn("stopping, once what runs has saved; the same command goes on from here")
        raise
    finally:
        pool.shutdown()


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
    earlier = resumed and run.minutes_file.exists()
    if run.minutes_file.parent.exists() and resumed == earlier:  # else killed: it is not known
        before = float(run.minutes_file.read_text()) if earlier else 0.0
        run.minutes_file.write_text(f"{before + minutes:.2f}\n")
    if process.returncode in (-signal.SIGINT, 128 + signal.SIGINT):
        raise KeyboardInterrupt
    reason = "" if alone else f": {process.stderr.strip()[-400:]}"
    require(process.returncode == 0, f"{run} failed{reason}")
    print(f"{minutes:5.1f} min  {run}", flush=True)


def list_experiments(config: ReproduceConfig) -> None:
    """Print what each experiment is about, and how long its commands took last, if known."""
    for name, plan in EXPERIMENTS.items():
        file = Experiment(name, config).folder / f"{name}.json"
        last = read_json(file) if file.exists() else {"minutes": None}
        known = f" [{last['minutes']:.0f} min, seeds: {last['seeds']}]" if last["minutes"] else ""
        print(f"{name:14} {plan.about}{known}")


def main(config: ReproduceConfig) -> None:
    if config.list:
        return list_experiments(config)
    config.model = "" if config.model == "tiny" else config.model
    require_min(config, seeds=1, jobs=0)
    require(config.only in ("", *MODELS), f"--only {config.only}: there are {', '.join(MODELS)}")
    require(bool(config.model) or not config.laptop, "--laptop needs a --model")
    names = [*EXPERIMENTS] if config.experiment == ["all"] else config.experiment
    require(bool(names), f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    for name in names:
        known = f"there are {', '.join(EXPERIMENTS)} and all"
        require(name in EXPERIMENTS, f"there is no experiment {name!r}; {known}")
    experiments = [Experiment(name, config) for name in names]
    for experiment in experiments:
        experiment.add_cells()
    runs = {output: run for experiment in experiments for output, run in experiment.runs.items()}
    left = [run for run in runs.values() if not run.finished()]
    try:
        run_commands(left, config)
    finally:
        unfinished = {run.output for run in left if not run.finished()}
        for experiment in experiments:
            if experiment.runs and not unfinished & experiment.runs.keys():
                experiment.report()


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(ReproduceConfig, __doc__, positional="experiment"))
