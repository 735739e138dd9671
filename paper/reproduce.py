"""Reproduce the paper's experiments: run their commands and hold the results against the paper's.

    python -m paper.reproduce --list                # the experiments, and how long they took last
    python -m paper.reproduce table1                # one seed
    python -m paper.reproduce table1 --seeds 3
    python -m paper.reproduce table1 --model models/smollm2
    python -m paper.reproduce table1 --model models/smollm2 --laptop --only FB    # on a laptop

Every number comes from a command that is printed below the table. Finished commands are not run
again, and one that Ctrl-C has interrupted resumes. Commands of the tiny model run side by side on
the CPU, one thread each; those of another have all cores, one after the other. Runs lie in
ckpt/reproduce, results in paper/results/NAME or NAME-MODEL (.json, .md and .png).

The experiments are in paper/plans.py, how their commands run in paper/experiment.py.
"""

from itertools import product

from lib.flags import parse_flags, quiet_pipes, read_json, require, require_min
from paper.experiment import MODELS, Experiment, ReproduceConfig
from paper.plans import EXPERIMENTS


def reproduce(name: str, config: ReproduceConfig) -> None:
    """Run an experiment's commands, read their rows and report."""
    plan, experiment = EXPERIMENTS[name], Experiment(name, config)
    others = Experiment(name, config)  # runs of other models than --only: none of them is started
    planned, rows, drawn = [], [], []
    for cell, seed in product(plan.cells, range(config.seeds)):
        chosen = experiment if config.only in ("", cell.model) else others
        sft = chosen.sft(cell.model, seed, **cell.sft)
        start = chosen.rl(sft, seed, **cell.rl_first) if cell.rl_first else sft
        rl, evaluation = chosen.rl(start, seed, **cell.rl), None
        if cell.evaluation is not None:
            evaluation = chosen.compare(sft, rl, seed, **cell.evaluation)
        planned.append((cell, seed, sft, rl, evaluation))
    require(bool(experiment.runs), f"{name} trains no model {config.only}")
    left_out = {path for path, run in others.runs.items() if not run.finished()}
    experiment.run()
    for cell, seed, sft, rl, evaluation in planned:
        if (evaluation or rl).output in left_out:
            continue
        experiment.runs |= {run.output: run for run in (sft, rl, evaluation) if run}
        row, log = cell.row(seed, evaluation), rl.log()
        rows.append(row | (plan.measure(cell, log) if plan.measure else {}))
        drawn.append(rows[-1] | {"log": log})
    claims = [claim for claim in plan.claims if claim.has_rows(rows, config.seeds)]
    verdicts = [claim.verdict(rows) for claim in claims]
    experiment.report(rows, plan.table(rows), verdicts, plan.draw(drawn))


def list_experiments(config: ReproduceConfig) -> None:
    """Print what each experiment is about and what its commands took when they last ran."""
    for name, plan in EXPERIMENTS.items():
        file, cost = Experiment(name, config).folder / f"{name}.json", "not run yet"
        if file.exists():
            last = read_json(file)
            cost = f"{last['seeds']} seed(s)"
            if last["minutes"] is not None:
                cost = f"{last['minutes']:.0f} min of commands for {cost}"
        print(f"{name:14} {plan.about} [{cost}]")


def main(config: ReproduceConfig) -> None:
    if config.list:
        return list_experiments(config)
    names = list(EXPERIMENTS) if config.experiment == ["all"] else config.experiment
    require(bool(names), f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    for name in names:
        known = f"there are {', '.join(EXPERIMENTS)} and all"
        require(name in EXPERIMENTS, f"there is no experiment {name!r}; {known}")
    require_min(config, seeds=1, jobs=0)
    require(config.only in ("", *MODELS), f"--only {config.only}: there are {', '.join(MODELS)}")
    require(bool(config.model) or not config.laptop, "--laptop needs a --model")
    for name in names:
        reproduce(name, config)


if __name__ == "__main__":
    with quiet_pipes():
        main(parse_flags(ReproduceConfig, __doc__, positional="experiment"))
