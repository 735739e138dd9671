"""The paper's experiments by name, from nothing to a table beside the paper's figures and a plot.

    python -m paper.reproduce --list                     # what there is, and what its commands took when they were last run
    python -m paper.reproduce table1                     # one seed
    python -m paper.reproduce table1 --seeds 3
    python -m paper.reproduce table1 --model models/smollm2

Every number comes from a command that is printed with the table; finished commands are not run again, and one that was
interrupted goes on where it stopped. On the CPU as many run side by side as there are cores, a thread each. Runs lie in
ckpt/reproduce, results in paper/results/NAME: NAME.json, NAME.md, NAME.png.

An experiment is a function that names its commands, has them run, and reads a row of figures a model, stage and seed
from what they left. Its table, its verdicts and its bars are made of these rows alone. A claim is judged for each seed
by itself.
"""

from collections.abc import Callable
from statistics import fmean

from data.finite_field import EVALUATION, FORWARD, INVERSION
from lib.flags import parse_flags, read_json, require, require_min
from lib.plots import draw_smoothly, new_figure
from paper.experiment import MODELS, Claim, Experiment, ReproduceConfig, markdown

MARGIN = 3  # percentage points below which two evaluations count as equal


# ------------------------------------------------------------------------------------------------------------------
# Figures, in percent

TYPES = (EVALUATION, INVERSION)
COLOURS = {EVALUATION: "tab:blue", INVERSION: "tab:orange"}
NAMES = ("all", INVERSION, EVALUATION)  # of pass@1 in a row


def percentages(summary: dict) -> dict[str, float]:
    """What rows take from eval.py's figures; 0 for an accuracy that has no cases."""
    overall, cells = summary["overall"], {"all": summary["overall"], **summary["by_type"]}
    row = {name: 100 * cells[name]["pass@1"] for name in NAMES if name in cells}
    others = ("match_rate", "accuracy_given_match", "forward_share", "backward_share")
    return row | {name: 100 * (overall[name] or 0.0) for name in others}


def of_seeds(rows: list[dict], key: str, **where) -> list[float]:
    """A figure of each seed, from the rows that have these values."""
    return [row[key] for row in rows if all(row[name] == value for name, value in where.items())]


def mean_and_range(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{fmean(values):.1f}" + (f" ({low:.1f}-{high:.1f})" if len(values) > 1 else "")


def course(*values: list[float]) -> str:
    return " -> ".join(map(mean_and_range, values))


def grew(before: list[float], after: list[float], least: float = MARGIN) -> list[bool]:
    """Whether the figure of each seed has grown by at least so much."""
    return [b - a >= least for a, b in zip(before, after, strict=True)]


def did_not_grow(before: list[float], after: list[float], least: float = MARGIN) -> list[bool]:
    return [not held for held in grew(before, after, least)]


def table(
    rows: list[dict],
    head: list[str],
    lines: dict[str, dict],
    keys,
    paper: dict[str, tuple] | None = None,
) -> str:
    """A line for each name in `lines`, of the rows that have its values: their figures `keys`, then the paper's."""
    cells = [
        [name, *(mean_and_range(of_seeds(rows, key, **where)) for key in keys)]
        for name, where in lines.items()
    ]
    return markdown(head, [[*cell, *map(str, (paper or {}).get(cell[0], ()))] for cell in cells])


def draw_bars(
    axis, x: float, values: list[float], width: float, colour: str, label: str | None, paper=None
) -> None:
    """The mean as a bar, the seeds as dots and the paper's figure as a line."""
    axis.bar(x, fmean(values), width, color=colour, alpha=0.75, label=label)
    axis.plot([x] * len(values), values, "k.", markersize=4)
    if paper is not None:
        axis.plot([x - width / 2, x + width / 2], [paper, paper], "k-", linewidth=1.5)


def draw_seeds(axis, logs: list[list[dict]], metric: str, colour, label: str) -> None:
    """A curve for each seed, in one colour under one label."""
    for i, log in enumerate(logs):
        draw_smoothly(
            axis, log, metric, color=colour, label=label if i == 0 else None, linewidth=1.3
        )


def legend_above(axis, columns: int = 3) -> None:
    axis.legend(
        frameon=False, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9
    )


# ------------------------------------------------------------------------------------------------------------------
# Table 1 and the course of training

STAGES = ("SFT", "RL 2-5", "RL 6-9")
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


def table1(experiment: Experiment) -> None:
    """SFT on backward, forward or both strategies, then RL on 2-5 or 6-9 steps: pass@1 on 6-9 steps"""
    hard = {"difficulty": "hard"}
    cells = {
        (model, rl): experiment.cell(model, {}, {"difficulty": rl}, hard)
        for model in MODELS
        for rl in ("easy", "hard")
    }
    experiment.run()
    rows = []
    for model in MODELS:
        for seed in experiment.seeds:
            easy, hard = (cells[model, rl][seed][2].result() for rl in ("easy", "hard"))
            for stage, summary in zip(STAGES, (hard["before"], easy["after"], hard["after"])):
                rows.append({"model": model, "stage": stage, "seed": seed} | percentages(summary))
    experiment.report(rows, table1_table(rows), table1_claims(rows), table1_figure(rows))


def table1_table(rows: list[dict]) -> str:
    lines = {f"{model}, {stage}": {"model": model, "stage": stage} for model, stage in PAPER_TABLE1}
    paper = {", ".join(cell): figures for cell, figures in PAPER_TABLE1.items()}
    head = ["model", *NAMES, "paper: all", INVERSION, EVALUATION]
    return "Pass@1 in % on 6-9 steps, mean and range of the seeds:\n\n" + table(
        rows, head, lines, NAMES, paper
    )


def table1_claims(rows: list[dict]) -> list[Claim]:
    def values(model: str, stage: str, key: str = "all") -> list[float]:
        return of_seeds(rows, key, model=model, stage=stage)

    def stages(model: str, key: str) -> list[list[float]]:
        return [values(model, stage, key) for stage in STAGES]

    everything = zip(*(values(*cell) for cell in PAPER_TABLE1))
    best = zip(
        values("FB", "RL 6-9"),
        everything,
        *(values("FB", "RL 6-9", kind) for kind in (INVERSION, EVALUATION)),
    )
    start, easy, hard = stages("FB", "all")
    fit, _, fit_after = stages("FB", "match_rate")
    given, given_easy, given_hard = stages("FB", "accuracy_given_match")
    claims: list[Claim] = [
        (
            "FB with RL on 6-9 steps is the best of the nine, above 90% on both types",
            course(start, hard),
            [found == max(all_) and min(types) > 90 for found, all_, *types in best],
        ),
        (
            "selection: the share of the matching strategy goes from about half to above 95%",
            course(fit, fit_after),
            [35 < a < 65 and b > 95 for a, b in zip(fit, fit_after)],
        ),
        ("improvement: accuracy given the matching strategy rises by RL on 6-9", course(given, given_hard),
         grew(given, given_hard, 5)),
        ("and needs harder data: it does not by RL on 2-5", course(given, given_easy), did_not_grow(given, given_easy)),
        ("FB gains by RL on 2-5", course(start, easy), grew(start, easy)),
    ]  # fmt: skip
    for model, matching, other, unknown in (
        ("F", EVALUATION, INVERSION, "backward"),
        ("B", INVERSION, EVALUATION, FORWARD),
    ):
        shares, chance = stages(model, f"{unknown}_share"), stages(model, other)
        start, easy, hard = stages(model, matching)
        claims += [
            (f"{model}: no new strategy, share of {unknown} responses", course(*shares),
             [max(share) < 1 for share in zip(*shares)]),
            (f"{model}: {other} stays within chance (9%)", course(*chance), [max(x) < 15 for x in zip(*chance)]),
            (f"{model} improves on {matching} by RL on 6-9", course(start, hard), grew(start, hard)),
            (f"{model} does not improve on {matching} by RL on 2-5", course(start, easy), did_not_grow(start, easy)),
        ]  # fmt: skip
    return claims


def table1_figure(rows: list[dict]):
    """Accuracy by type of the nine models."""
    figure, axes = new_figure(11, 3.6, 1, 3)
    for axis, model in zip(axes, MODELS):
        for i, kind in enumerate((EVALUATION, INVERSION)):
            for j, stage in enumerate(STAGES):
                found, paper = (
                    of_seeds(rows, kind, model=model, stage=stage),
                    PAPER_TABLE1[model, stage][2 - i],
                )
                draw_bars(
                    axis,
                    j + 0.4 * i - 0.2,
                    found,
                    0.36,
                    COLOURS[kind],
                    kind if j == 0 else None,
                    paper,
                )
        axis.set(title=f"SFT on {MODELS[model]}", xticks=range(3), ylim=(0, 102))
        axis.set_xticklabels(STAGES)
    axes[0].plot([], [], "k-", label="paper")
    axes[0].plot([], [], "k.", label="a seed")
    axes[0].set_ylabel("pass@1 on 6-9 steps, %")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def dynamics(experiment: Experiment) -> None:
    """The course of RL on 6-9 steps: accuracy by type and by number of steps (figures 2-4; runs of table1)"""
    cells = {model: experiment.cell(model, {}, {"difficulty": "hard"}) for model in MODELS}
    experiment.run()
    logs = {model: [run.log() for _, run in runs] for model, runs in cells.items()}
    rows = []
    for model in MODELS:
        for seed, log in enumerate(logs[model]):
            ends = {"first": log[: len(log) // 10], "last": log[-len(log) // 10 :]}
            for when, some in ends.items():
                row = {
                    kind: 100
                    * fmean(x[f"accuracy/{kind}"] for x in some if f"accuracy/{kind}" in x)
                    for kind in TYPES
                }
                rows.append({"model": model, "seed": seed, "updates": f"{when} tenth"} | row)
    experiment.report(rows, dynamics_table(rows), dynamics_claims(rows), dynamics_figure(logs))


def dynamics_table(rows: list[dict]) -> str:
    lines = {
        f"{model}, {when} of the updates": {"model": model, "updates": when}
        for model in MODELS
        for when in ("first tenth", "last tenth")
    }
    return "Accuracy in RL in %, on its own problems:\n\n" + table(
        rows, ["model", *TYPES], lines, TYPES
    )


def dynamics_claims(rows: list[dict]) -> list[Claim]:
    weaker = {
        model: [
            min(both)
            for both in zip(
                *(of_seeds(rows, kind, model=model, updates="last tenth") for kind in TYPES)
            )
        ]
        for model in MODELS
    }
    found = ", ".join(f"{model} {mean_and_range(values)}" for model, values in weaker.items())
    held = [
        fb > 90 > 20 > max(b, f) for b, f, fb in zip(*(weaker[model] for model in ("B", "F", "FB")))
    ]
    return [
        (
            "only FB approaches 100% on both types (the weaker type, last tenth of the updates)",
            found,
            held,
        )
    ]


def dynamics_figure(logs: dict[str, list[list[dict]]]):
    figure, axes = new_figure(13, 6.5, 2, 3)
    shades = ("#9ecae1", "#6baed6", "#3182bd", "#08306b")
    for column, model in enumerate(MODELS):
        steps = sorted(
            int(key.split("/")[1])
            for key in logs[model][0][0]
            if key.startswith("accuracy_at_steps/")
        )
        for kind in TYPES:
            draw_seeds(axes[column], logs[model], f"accuracy/{kind}", COLOURS[kind], kind)
        metrics = [f"accuracy_at_steps/{n}" for n in steps]
        for n, metric, shade in zip(steps, metrics, shades):
            draw_seeds(
                axes[3 + column], [mean_log(logs[model], metrics)], metric, shade, f"{n} steps"
            )
        axes[column].set(ylim=(0, 1.02), xlabel="", title=f"SFT on {MODELS[model]}")
        axes[3 + column].set(ylim=(0, 1.02))
    axes[0].set_ylabel("accuracy in RL, by type")
    axes[3].set_ylabel("by number of steps, mean of the seeds")
    for axis in (axes[0], axes[3]):
        axis.legend(fontsize=8, frameon=False)
    return figure


def mean_log(logs: list[list[dict]], metrics: list[str]) -> list[dict]:
    """The mean of the seeds, update by update, where any has the metric."""
    rows = []
    for same in zip(*logs):
        values = {
            metric: [row[metric] for row in same if row.get(metric) is not None]
            for metric in metrics
        }
        rows.append(
            {"update": same[0]["update"]}
            | {metric: fmean(found) for metric, found in values.items() if found}
        )
    return rows


# ------------------------------------------------------------------------------------------------------------------
# Amplification and composition

SHARES = (0.5, 0.75, 0.9)  # of evaluation among the problems of RL
ON_THE_WAY = range(16, 26)  # updates in which the tiny model learns to choose
AMPLIFIED = {
    "stream": "forward in the RL stream, last tenth of the updates",
    "learning": f"updates {ON_THE_WAY[0]}-{ON_THE_WAY[-1]}, were its problems 50:50",
    "forward_share": "validation (50:50), after RL",
}


def amplification(experiment: Experiment) -> None:
    """RL on 50, 75 and 90% evaluation problems: the share of forward responses follows the data"""
    hard = {"difficulty": "hard"}
    cells = {
        share: experiment.cell(
            "FB", {}, hard | ({"evaluation_share": share} if share != 0.5 else {}), hard
        )
        for share in SHARES
    }
    experiment.run()
    rows, logs = [], {share: [run.log() for _, run, _ in runs] for share, runs in cells.items()}
    for share, runs in cells.items():
        for seed, (log, (*_, compared)) in enumerate(zip(logs[share], runs)):
            row = {"evaluation_share": share, "seed": seed} | percentages(
                compared.result()["after"]
            )
            row["stream"] = 100 * fmean(x[f"{FORWARD}/all"] for x in log[-len(log) // 10 :])
            row["learning"] = 100 * forward_if_balanced(
                [x for x in log if x["update"] in ON_THE_WAY]
            )
            rows.append(row)
    experiment.report(
        rows, amplification_table(rows), amplification_claims(rows), amplification_figure(logs)
    )


def forward_if_balanced(log: list[dict]) -> float:
    """The mean share of forward responses in some updates, if half of their problems had been evaluation."""
    by_type = [[x[f"{FORWARD}/{kind}"] for x in log if f"{FORWARD}/{kind}" in x] for kind in TYPES]
    return fmean(map(fmean, by_type))


def amplification_table(rows: list[dict]) -> str:
    lines = {f"{share:.0%}": {"evaluation_share": share} for share in SHARES}
    head = ["evaluation in RL", *AMPLIFIED.values()]
    return "Share of forward responses in %:\n\n" + table(rows, head, lines, AMPLIFIED)


def amplification_claims(rows: list[dict]) -> list[Claim]:
    def of_shares(name: str) -> list[tuple[float, ...]]:
        """Of each seed, the figures at 50, 75 and 90%."""
        return list(zip(*(of_seeds(rows, name, evaluation_share=share) for share in SHARES)))

    def claim(text: str, name: str, holds: Callable[..., bool]) -> Claim:
        found = ", ".join(f"{fmean(values):.1f}" for values in zip(*of_shares(name)))
        return text, found, [holds(*values) for values in of_shares(name)]

    def follows(*values: float) -> bool:
        return all(abs(found - 100 * share) < 6 for found, share in zip(values, SHARES))

    def rises(low: float, middle: float, high: float) -> bool:
        return low + 2 < middle < high - 2

    return [
        claim(
            "the share of forward responses in the RL stream follows the data: 50, 75, 90%",
            "stream",
            follows,
        ),
        claim("and rises with it on balanced validation data, after RL", "forward_share", rises),
        claim("(ours) or at least on the way, while RL teaches the choice", "learning", rises),
    ]


def amplification_figure(logs: dict[float, list[list[dict]]]):
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, share in enumerate(SHARES):
        draw_seeds(axis, logs[share], f"{FORWARD}/all", f"C{i}", f"{share:.0%} evaluation")
        axis.axhline(share, color=f"C{i}", linewidth=0.8, linestyle=":")
    axis.set(ylabel="share of forward responses in the RL stream", ylim=(0, 1))
    axis.legend(frameon=False)
    return figure


COMPOSITIONS = {
    "single parts": {},
    "1-2 parts": {"parts": "1-2"},
    "1-3 parts": {"parts": "1-3"},
}  # SFT data


def composition(experiment: Experiment) -> None:
    """RL on compositions of 3-5 parts, from SFT on single parts, on up to two (the paper's) and on up to three"""
    longer = (
        {} if experiment.config.model else {"updates": 2400}
    )  # compositions take the tiny model longer to learn
    rl, farther = ({"difficulty": "easy", "parts": parts} for parts in ("3-5", "4-5"))
    cells = {
        name: experiment.cell("FB", longer | flags, rl, rl, farther)
        for name, flags in COMPOSITIONS.items()
    }
    experiment.run()
    rows, logs = [], {name: [run.log() for _, run, *_ in runs] for name, runs in cells.items()}
    for name, runs in cells.items():
        for seed, (sft, _, *compared) in enumerate(runs):
            own = {"sft_accuracy_given_fit": 100 * (sft.log()[-1]["accuracy_given_match"] or 0.0)}
            for parts, result in zip(("3-5", "4-5"), (run.result() for run in compared)):
                for stage, side in (("SFT", "before"), ("RL", "after")):
                    row = {"sft": name, "parts": parts, "stage": stage, "seed": seed}
                    rows.append(row | percentages(result[side]) | own)
    experiment.report(
        rows, composition_table(rows), composition_claims(rows), composition_figure(logs)
    )


def composition_table(rows: list[dict]) -> str:
    head = ["SFT on", "right if matching on its own data"]
    for parts in ("3-5", "4-5"):
        head += [f"{parts} parts: SFT", "RL", "matching throughout: SFT", "RL"]
    lines = []
    for name in COMPOSITIONS:
        line = [
            name,
            mean_and_range(
                of_seeds(rows, "sft_accuracy_given_fit", sft=name, parts="3-5", stage="SFT")
            ),
        ]
        for parts in ("3-5", "4-5"):
            for key in ("all", "match_rate"):
                for stage in ("SFT", "RL"):
                    line.append(
                        mean_and_range(of_seeds(rows, key, sft=name, parts=parts, stage=stage))
                    )
        lines.append(line)
    text = "Pass@1 in %, and the share of responses in % that take the matching strategy in every part:"
    return f"{text}\n\n{markdown(head, lines)}"


def composition_claims(rows: list[dict]) -> list[Claim]:
    def change(name: str, parts: str) -> tuple[list[float], list[float]]:
        before, after = (
            of_seeds(rows, "all", sft=name, parts=parts, stage=stage) for stage in ("SFT", "RL")
        )
        return before, after

    single, two, three = (
        change("single parts", "3-5"),
        change("1-2 parts", "3-5"),
        change("1-3 parts", "4-5"),
    )
    return [
        ("RL learns 3-5 parts if SFT held compositions of two", course(*two), grew(*two, 10)),
        ("and not if it held none", course(*single), did_not_grow(*single, 5)),
        (
            "(ours) a weaker form: it learns 4-5 parts if SFT held up to three",
            course(*three),
            grew(*three, 10),
        ),
    ]


def composition_figure(logs: dict[str, list[list[dict]]]):
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, name in enumerate(COMPOSITIONS):
        draw_seeds(axis, logs[name], "reward", f"C{i}", name)
    axis.set(ylabel="reward on compositions of 3-5 parts", ylim=(0, 1.02))
    axis.legend(title="SFT on", frameon=False)
    return figure


# ------------------------------------------------------------------------------------------------------------------
# Other fields, lengths and settings

GF13_STAGES = ("SFT, on 2-5", "SFT", "RL 6-9")


def gf13(experiment: Experiment) -> None:
    """The three SFT models in GF(13), then RL on 6-9 steps"""
    rl, compared = (
        {"difficulty": "hard", "field": 13},
        ({"difficulty": "easy"}, {"difficulty": "hard"}),
    )
    cells = {model: experiment.cell(model, {"field": 13}, rl, *compared) for model in MODELS}
    experiment.run()
    rows = []
    for model, runs in cells.items():
        for seed, (_, _, *compared) in enumerate(runs):
            easy, hard = (run.result() for run in compared)
            for stage, summary in zip(GF13_STAGES, (easy["before"], hard["before"], hard["after"])):
                rows.append({"model": model, "stage": stage, "seed": seed} | percentages(summary))
    experiment.report(rows, gf13_table(rows), gf13_claims(rows), gf13_figure(rows))


def gf13_table(rows: list[dict]) -> str:
    lines = {
        f"{model}, {stage}": {"model": model, "stage": stage}
        for model in MODELS
        for stage in GF13_STAGES
    }
    text = "Pass@1 in % in GF(13), on 6-9 steps but where it says 2-5:"
    return f"{text}\n\n{table(rows, ['model', *NAMES], lines, NAMES)}"


def gf13_claims(rows: list[dict]) -> list[Claim]:
    easy, final = (
        {m: of_seeds(rows, "all", model=m, stage=stage) for m in MODELS}
        for stage in (GF13_STAGES[0], "RL 6-9")
    )

    def found(values: dict[str, list[float]]) -> str:
        return ", ".join(
            f"{model} {mean_and_range(of_model)}" for model, of_model in values.items()
        )

    return [
        ("all three SFT models reach 70-80% on 2-5 steps", found(easy),
         [all(70 <= x <= 80 for x in of_seed) for of_seed in zip(*easy.values())]),
        ("(ours) the three are alike there, within five points", found(easy),
         [max(of_seed) - min(of_seed) < 5 for of_seed in zip(*easy.values())]),
        ("after RL on 6-9 steps only FB is near perfect", found(final),
         [fb > 90 > 70 > max(b, f) for b, f, fb in zip(*final.values())]),
    ]  # fmt: skip


def gf13_figure(rows: list[dict]):
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for i, kind in enumerate(TYPES):
        for j, model in enumerate(MODELS):
            found = of_seeds(rows, kind, model=model, stage="RL 6-9")
            draw_bars(axis, j + 0.4 * i - 0.2, found, 0.36, COLOURS[kind], kind if j == 0 else None)
    axis.axhline(100 / 13, color="grey", linewidth=0.8, linestyle=":", label="a guess")
    axis.set(xticks=range(3), ylabel="pass@1 on 6-9 steps after RL, GF(13), %", ylim=(0, 102))
    axis.set_xticklabels([f"SFT on {shown}" for shown in MODELS.values()])
    legend_above(axis)
    return figure


def extreme(experiment: Experiment) -> None:
    """FB reinforced on 6-15 steps"""
    runs = experiment.cell("FB", {}, {"difficulty": "extreme"}, {"difficulty": "extreme"})
    experiment.run()
    rows = []
    for seed, (*_, compared) in enumerate(runs):
        for stage, side in (("SFT", "before"), ("RL 6-15", "after")):
            summary = compared.result()[side]
            by_steps = {steps: 100 * c["pass@1"] for steps, c in summary["by_steps"].items()}
            rows.append(
                {"stage": stage, "seed": seed} | percentages(summary) | {"by_steps": by_steps}
            )
    experiment.report(rows, extreme_table(rows), extreme_claims(rows), extreme_figure(rows))


def extreme_table(rows: list[dict]) -> str:
    lines = {f"FB, {stage}": {"stage": stage} for stage in ("SFT", "RL 6-15")}
    return "Pass@1 in % on 6-15 steps:\n\n" + table(rows, ["model", *NAMES], lines, NAMES)


def extreme_claims(rows: list[dict]) -> list[Claim]:
    before, after = (of_seeds(rows, "all", stage=stage) for stage in ("SFT", "RL 6-15"))
    return [
        ("FB still improves clearly on 6-15 steps", course(before, after), grew(before, after, 10))
    ]


def extreme_figure(rows: list[dict]):
    figure, (axis,) = new_figure(6, 4, 1, 1)
    for stage, colour in (("SFT", "0.6"), ("RL 6-15", "tab:blue")):
        for i, by_steps in enumerate(of_seeds(rows, "by_steps", stage=stage)):
            label = stage if i == 0 else None
            axis.plot(
                [int(n) for n in by_steps],
                list(by_steps.values()),
                "o-",
                color=colour,
                label=label,
                markersize=4,
            )
    axis.set(xlabel="number of steps", ylabel="pass@1 on validation problems, %", ylim=(0, 102))
    legend_above(axis)
    return figure


ROBUSTNESS = {  # RL flags, and the paper's final accuracy of B, F and FB
    "default": ({}, (53, 60, 97)),
    "beta 0.1": ({"beta": 0.1}, (53, 58, 96)),
    "group 16": ({"group_size": 16}, (58, 51, 98)),
    "group 16, beta 0.1": ({"group_size": 16, "beta": 0.1}, (53, 52, 97)),
}


def robustness(experiment: Experiment) -> None:
    """Other KL weights and group sizes: the final accuracy of B, F and FB on 6-9 steps"""
    hard = {"difficulty": "hard"}
    cells = {
        (name, model): experiment.cell(model, {}, hard | flags, hard)
        for name, (flags, _) in ROBUSTNESS.items()
        for model in MODELS
    }
    experiment.run()
    rows = [
        {"rl": name, "model": model, "seed": seed} | percentages(compared.result()["after"])
        for (name, model), runs in cells.items()
        for seed, (*_, compared) in enumerate(runs)
    ]
    experiment.report(
        rows, robustness_table(rows), robustness_claims(rows), robustness_figure(rows)
    )


def robustness_table(rows: list[dict]) -> str:
    lines = [
        [
            name,
            *(mean_and_range(of_seeds(rows, "all", rl=name, model=model)) for model in MODELS),
            " / ".join(map(str, paper)),
        ]
        for name, (_, paper) in ROBUSTNESS.items()
    ]
    return f"Pass@1 in % on 6-9 steps, after RL:\n\n{markdown(['RL', *MODELS, 'paper: B / F / FB'], lines)}"


def robustness_claims(rows: list[dict]) -> list[Claim]:
    settings = {
        name: [of_seeds(rows, "all", rl=name, model=model) for model in MODELS]
        for name in ROBUSTNESS
    }
    ahead = {
        name: [fb - max(b, f) for b, f, fb in zip(*values)] for name, values in settings.items()
    }
    found = ", ".join(f"{name}: +{mean_and_range(values)}" for name, values in ahead.items())
    return [("FB is far ahead of B and F, by 20 points or more, whatever the setting", found,
             [min(of_seed) >= 20 for of_seed in zip(*ahead.values())])]  # fmt: skip


def robustness_figure(rows: list[dict]):
    figure, (axis,) = new_figure(7, 4, 1, 1)
    for i, model in enumerate(MODELS):
        for j, (name, (_, paper)) in enumerate(ROBUSTNESS.items()):
            found = of_seeds(rows, "all", rl=name, model=model)
            draw_bars(
                axis, j + 0.27 * (i - 1), found, 0.25, f"C{i}", model if j == 0 else None, paper[i]
            )
    axis.plot([], [], "k-", label="paper")
    axis.set(xticks=range(len(ROBUSTNESS)), ylabel="pass@1 on 6-9 steps after RL, %", ylim=(0, 102))
    axis.set_xticklabels(ROBUSTNESS)
    legend_above(axis, 4)
    return figure


EXPERIMENTS: dict[str, Callable[[Experiment], None]] = {
    function.__name__: function
    for function in (table1, dynamics, amplification, composition, gf13, extreme, robustness)
}


def main(config: ReproduceConfig) -> None:
    if config.list:
        for name, function in EXPERIMENTS.items():
            known = Experiment(name, config).folder / f"{name}.json"
            last = read_json(known) if known.exists() else {}
            cost = (
                f"{last['minutes']:.0f} min of commands for {last['seeds']} seed(s)"
                if last
                else "not run yet"
            )
            print(f"{name:14} {function.__doc__} [{cost}]")
        return
    names = list(EXPERIMENTS) if config.experiment == ["all"] else config.experiment
    for name in names:
        require(
            name in EXPERIMENTS,
            f"there is no experiment {name!r}; there are {', '.join(EXPERIMENTS)} and all",
        )
    require(bool(names), f"name an experiment: {', '.join(EXPERIMENTS)} or all")
    require_min(config, seeds=1, jobs=0)
    for name in names:
        EXPERIMENTS[name](Experiment(name, config))


if __name__ == "__main__":
    main(parse_flags(ReproduceConfig, __doc__, positional="experiment"))
