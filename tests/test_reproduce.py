"""Tables and verdicts of the experiments on made-up results; finished commands do not run again."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from conftest import refusal, response

from data.finite_field import EVALUATION, INVERSION, MATCHING_STRATEGY
from eval import compare, rollout_metrics, summarise
from lib.flags import parse_flags, read_json, write_json
from paper import plans, reproduce
from paper.experiment import verdict_table
from paper.plans import EXPERIMENTS
from paper.reproduce import Experiment, ReproduceConfig, Run, main, run_commands

OTHER = {"forward": "backward", "backward": "forward"}


def responses(
    shown: str, match_rate: float, accuracy: float, kinds=(EVALUATION, INVERSION) * 10
) -> list[list]:
    """Return ten responses to each problem, in fixed proportions.

    shown: the strategy, or "mixed", that the model was shown
    """
    scored = []
    for i, kind in enumerate(kinds):
        matching, group = MATCHING_STRATEGY[kind], []
        for j in range(10):
            mixed = matching if j < 10 * match_rate else OTHER[matching]
            strategy = shown if shown != "mixed" else mixed
            matches = strategy == matching
            right = j % 5 < 5 * accuracy if matches else j == 5
            error = None if right else "order"
            group.append(response(kind, 6 + i % 4, strategy, matches, right, error, True))
        scored.append(group)
    return scored


def unsolved(scored: list[list]) -> list[list]:
    """Make every fifth problem one that no response solves."""
    wrong = {"correct": False, "error": "order"}
    return [[replace(r, **wrong) for r in g] if i % 5 == 0 else g for i, g in enumerate(scored)]


def openings(access: float, faultless: float, other: float, neither: float = 0.0) -> dict:
    """Return what eval.py --force writes: parts of the matching strategy, and of the other."""
    measured: dict = {kind: {} for kind in MATCHING_STRATEGY}
    for kind, matching in MATCHING_STRATEGY.items():
        for strategy, opens, right in (
            (matching, access, faultless),
            (OTHER[matching], 1 - access - neither, other),
        ):
            parts = {"access": opens, "execution": right, "faultless": right}
            measured[kind][strategy] = {name: {"mean": x} for name, x in parts.items()}
    return measured


def write_log(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_by(run, **changes) -> str:
    """Return training.json of a finished run of a command."""
    return json.dumps(asdict(run.settings()) | {"update": 3, "total": 3} | changes)


def leave_results(runs: list[Run], config: ReproduceConfig) -> None:
    """Instead of running commands, write what they leave where the paper's claims hold."""
    for run in runs:
        name = str(run.output)
        strategies = ("forward", "backward")
        shown = next((s for s in strategies if f"-{s[0].upper()}-" in name), "mixed")
        harder = "-rl-difficulty-easy" not in name or "parts-3-5" in name
        seeded = "window" in name or "parts" not in name
        run.output.parent.mkdir(parents=True, exist_ok=True)
        run.minutes_file.write_text("3.0")
        if run.script != "eval.py":
            (run.output / "step-3").mkdir(parents=True, exist_ok=True)
            (run.output / "step-3" / "training.json").write_text(made_by(run))
        if run.script == "train_grpo.py":
            n = round(20 * float(run.flags.get("evaluation_share", 0.5)))
            after = responses(shown, 1.0, 1.0, [EVALUATION] * n + [INVERSION] * (20 - n))
            metrics = rollout_metrics(after) | {"reward": 0.9, "clip_ratio": 0.1}
            write_log(run.output, [{"update": u} | metrics for u in range(1, 31)])
        elif run.script == "eval.py":
            before = responses(shown, 0.5, 0.6 if seeded else 0.0)
            after = responses(shown, 1.0, (1.0 if harder else 0.6) if seeded else 0.0)
            if "samples" in run.flags and "force" not in run.flags:
                before, after = unsolved(before), after if harder else unsolved(after)
                before, after = ([26 * group for group in x] for x in (before, after))
            found = {"before": summarise(before), "after": summarise(after)}
            found["difference"] = compare(before, after)
            if "force" in run.flags:
                of_start = openings(0.5, 0.6, 0.5)
                if "parts" in name and "window" not in name:
                    of_start = openings(0.0, 0.6, 0.5, neither=1.0)
                of_end = openings(1.0, *((1.0, 0.9) if harder else (0.6, 0.5)))
                found["openings"] = {"before": of_start, "after": of_end}
            write_json(run.output, found)


NOT_IN_THIS_WORLD = ("on balanced validation data", "at least on the way", "70-80%", "alike")
NOT_IN_THIS_WORLD += ("matches alone",)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_reports_what_its_commands_left(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    main(ReproduceConfig([name], seeds=2, jobs=2))
    result = json.loads((tmp_path / "paper/results" / name / f"{name}.json").read_text())
    text = (tmp_path / "paper/results" / name / f"{name}.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("python ")]
    assert result["seeds"] == 2 and {row["seed"] for row in result["rows"]} == {0, 1}
    assert result["minutes"] == 3.0 * len(commands)
    assert any("train_grpo.py" in line for line in commands) and text in capsys.readouterr().out
    for text, _, held in result["claims"]:
        if not any(part in text for part in NOT_IN_THIS_WORLD):
            assert held == [True, True], text
    assert (tmp_path / "paper/results" / name / f"{name}.png").stat().st_size > 5_000


def test_table1_has_the_rows_that_others_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    main(ReproduceConfig(["table1"], seeds=1))
    rows = json.loads(Path("paper/results/table1/table1.json").read_text())["rows"]
    assert len(rows) == 9
    by_name = {f"{row['model']}, {row['stage']}": row for row in rows}
    assert set(by_name) == set(plans.PAPER_TABLE1)
    best, sft, easy = (by_name[name] for name in ("FB, RL 6-9", "F, SFT", "FB, RL 2-5"))
    assert (best["all"], best["inversion"], best["evaluation"], best["seed"]) == (100, 100, 100, 0)
    assert sft["evaluation"] == pytest.approx(60) and sft["inversion"] == pytest.approx(10)
    assert (sft["forward_share"], sft["backward_share"], sft["match_rate"]) == (100, 0, 50)
    assert easy["accuracy_given_match"] == pytest.approx(60)


def test_amplification_reads_the_stream_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    main(ReproduceConfig(["amplification"]))
    rows = json.loads(Path("paper/results/amplification/amplification.json").read_text())["rows"]
    found = [(row["evaluation_share"], row["stream"], row["learning"]) for row in rows]
    assert found == [pytest.approx((share, 100 * share, 50)) for share in (0.5, 0.75, 0.9)]


# ------------------------------------------------------------------------------------------------
# Verdicts: in rows for which every claim holds, move one number of one seed across a bound

SINGLE = {"match_rate": 50.0, "accuracy_given_match": 60.0}
KNOWN = {"F": ("evaluation", "inversion", "forward"), "B": ("inversion", "evaluation", "backward")}


def table1_rows() -> list[dict]:
    rows = []
    for seed in range(2):
        for model, (matching, other, known) in KNOWN.items():
            shares = {"forward_share": 0.0, "backward_share": 0.0, f"{known}_share": 100.0}
            for stage, right in (("SFT", 60.0), ("RL 2-5", 60.0), ("RL 6-9", 96.0)):
                accuracies = {"all": right / 2, matching: right, other: 9.0}
                rows.append({"model": model, "stage": stage, "seed": seed} | accuracies)
                rows[-1] |= SINGLE | shares
        for stage, right, match_rate, given_match in (
            ("SFT", 33.0, 50, 60),
            ("RL 2-5", 60.0, 100, 60),
            ("RL 6-9", 99.0, 100, 99),
        ):
            accuracies = dict.fromkeys(("all", "inversion", "evaluation"), right)
            rows.append({"model": "FB", "stage": stage, "seed": seed} | accuracies)
            rows[-1] |= {"match_rate": match_rate, "accuracy_given_match": given_match}
            rows[-1] |= {"forward_share": 50.0, "backward_share": 50.0}
    return rows


def rows_of(name: str) -> list[dict]:
    """Return rows of two seeds for which every claim of an experiment holds."""
    if name == "table1":
        return table1_rows()
    rows = {
        "dynamics": [
            {"model": model, "updates": "last tenth", "evaluation": x, "inversion": y}
            for model, x, y in (("B", 9, 97), ("F", 99, 9), ("FB", 99, 99))
        ],
        "amplification": [
            {"evaluation_share": share, "stream": x, "forward_share": y, "learning": y}
            for share, x, y in ((0.5, 50, 50), (0.75, 75, 53), (0.9, 90, 58))
        ],
        "openings": [
            {"stage": stage, "access, matching": opens, "faultless, matching": right}
            | {"faultless, other": right}
            for stage, opens, right in (("SFT", 50, 60), ("RL 2-5", 99, 60), ("RL 6-9", 99, 99))
        ],
        "ceiling": [
            {"stage": stage, "verified@1": first, "verified@256": last}
            for stage, first, last in (("SFT", 20, 80), ("RL 2-5", 60, 80), ("RL 6-9", 99, 99))
        ],
        "composition": [
            {"sft": sft, "stage": stage, "verified@1": 5 if stage == "SFT" else after}
            for sft, after in zip(plans.SFT_PARTS, (5, 90))
            for stage in ("SFT", "RL")
        ],
        "third-part": [
            {"sft": sft, "stage": stage, "access, matching": opens, "access, other": 0}
            for sft in plans.SFT_PARTS
            for stage, opens in (("SFT", 0), ("RL", 99))
        ],
        "losses": [{"loss": name, "all": 94} for name in plans.LOSSES],
        "gf13": [
            {"model": model, "stage": stage, "all": right, "evaluation": 99, "inversion": 99}
            for model, easy, hard in (("B", 74, 54), ("F", 73, 53), ("FB", 72, 98))
            for stage, right in (("SFT, on 2-5", easy), ("SFT", 40), ("RL 6-9", hard))
        ],
        "extreme": [
            {"stage": stage, "all": right}
            for stage, right in (("SFT", 20), ("RL 6-15", 80), ("RL 6-9, then 6-15", 97))
        ],
        "robustness": [
            {"rl": rl, "model": model, "all": right}
            for rl in plans.SETTINGS
            for model, right in (("B", 50), ("F", 55), ("FB", 97))
        ],
    }
    return [row | {"seed": seed} for seed in range(2) for row in rows[name]]


def of(model: str, stage: str) -> dict:
    return {"model": model, "stage": stage}


def at(sft: str, stage: str) -> dict:
    return {"sft": sft, "stage": stage}


# experiment, row, key, a value for which all claims hold, one for which a claim fails, that claim
BOUNDS = [
    ("table1", of("FB", "RL 6-9"), "inversion", 90.1, 89.9, "above 90%"),
    ("table1", of("F", "RL 6-9"), "all", 98.9, 99, "best of the nine"),
    ("table1", of("FB", "RL 6-9"), "match_rate", 95.1, 94.9, "selection"),
    ("table1", of("FB", "SFT"), "match_rate", 64.9, 65.1, "selection"),
    ("table1", of("FB", "SFT"), "match_rate", 35.1, 34.9, "selection"),
    ("table1", of("FB", "RL 6-9"), "accuracy_given_match", 65.1, 64.9, "improvement"),
    ("table1", of("FB", "RL 2-5"), "accuracy_given_match", 62.9, 63.1, "needs harder data"),
    ("table1", of("FB", "RL 2-5"), "all", 36.1, 35.9, "FB gains"),
    ("table1", of("F", "RL 2-5"), "backward_share", 0.9, 1.1, "F: no new strategy"),
    ("table1", of("B", "SFT"), "forward_share", 0.9, 1.1, "B: no new strategy"),
    ("table1", of("F", "RL 6-9"), "inversion", 14.9, 15.1, "F: inversion stays"),
    ("table1", of("B", "RL 2-5"), "evaluation", 14.9, 15.1, "B: evaluation stays"),
    ("table1", of("F", "RL 6-9"), "evaluation", 63.1, 62.9, "F improves"),
    ("table1", of("B", "RL 6-9"), "inversion", 63.1, 62.9, "B improves"),
    ("table1", of("F", "RL 2-5"), "evaluation", 62.9, 63.1, "F does not improve"),
    ("table1", of("B", "RL 2-5"), "inversion", 62.9, 63.1, "B does not improve"),
    ("dynamics", {"model": "FB"}, "inversion", 90.1, 89.9, "only FB"),
    ("dynamics", {"model": "F"}, "inversion", 19.9, 20.1, "only FB"),
    ("amplification", {"evaluation_share": 0.9}, "stream", 84.1, 83.9, "in the RL stream"),
    (
        "amplification",
        {"evaluation_share": 0.9},
        "forward_share",
        55.1,
        54.9,
        "on balanced validation",
    ),
    ("amplification", {"evaluation_share": 0.5}, "learning", 50.9, 51.1, "on the way"),
    ("openings", {"stage": "RL 2-5"}, "access, matching", 95.1, 94.9, "always"),
    ("openings", {"stage": "RL 2-5"}, "faultless, matching", 62.9, 63.1, "no better"),
    ("openings", {"stage": "RL 6-9"}, "faultless, matching", 65, 64.9, "executes it better"),
    ("openings", {"stage": "RL 6-9"}, "faultless, other", 65, 64.9, "the other one, too"),
    ("ceiling", {"stage": "RL 2-5"}, "verified@1", 30, 29.9, "moves verified@1"),
    ("ceiling", {"stage": "RL 2-5"}, "verified@256", 82.9, 83.1, "not the end"),
    ("ceiling", {"stage": "RL 2-5"}, "verified@256", 77.1, 76.9, "not the end"),
    ("ceiling", {"stage": "RL 6-9"}, "verified@256", 83, 82.9, "moves the end, too"),
    ("composition", at("the last two parts", "RL"), "verified@1", 35, 34.9, "learns 3-5 parts"),
    ("composition", at("single parts", "RL"), "verified@1", 9.9, 10, "single parts"),
    ("third-part", at("single parts", "SFT"), "access, other", 1.9, 2, "never opens"),
    ("third-part", at("the last two parts", "RL"), "access, matching", 95.1, 95, "opens it"),
    ("gf13", of("B", "SFT, on 2-5"), "inversion", 95.1, 95, "matches alone"),
    ("gf13", of("B", "SFT, on 2-5"), "all", 70.1, 69.9, "70-80%"),
    ("gf13", of("FB", "SFT, on 2-5"), "all", 77.9, 78.1, "alike"),
    ("gf13", of("F", "RL 6-9"), "all", 69.9, 70.1, "near perfect"),
    ("extreme", {"stage": "RL 6-15"}, "all", 30, 29.9, "still improves"),
    ("losses", {"loss": "GSPO"}, "all", 90.1, 89.9, "above 90%"),
    ("losses", {"loss": "CISPO"}, "all", 98.9, 99.1, "within five points"),
    ("robustness", {"rl": "beta 0.1", "model": "FB"}, "all", 75, 74.9, "far ahead"),
]


def verdicts(name: str, rows: list[dict]) -> list[list]:
    return [claim.verdict(rows) for claim in EXPERIMENTS[name].claims]


@pytest.mark.parametrize("name, where, key, inside, outside, claim", BOUNDS)
def test_each_claim_fails_where_it_should_and_alone(name, where, key, inside, outside, claim):
    for value, expected in ((inside, []), (outside, [claim])):
        rows = rows_of(name)
        moved = [row for row in rows if row["seed"] == 1 and where.items() <= row.items()]
        assert len(moved) == 1
        moved[0][key] = value
        found = verdicts(name, rows)
        assert all(held[0] for _, _, held in found), "the other seed is judged by itself"
        failed = [text for text, _, held in found if not held[1]]
        assert len(failed) == len(expected), failed
        assert all(part in text for part, text in zip(expected, failed)), failed


def test_every_claim_is_put_to_the_test():
    for name in EXPERIMENTS:
        tested = [claim for experiment_name, *_, claim in BOUNDS if experiment_name == name]
        for text, _, _ in verdicts(name, rows_of(name)):
            assert any(part in text for part in tested), text


def test_verdicts_in_words():
    held = {"a": [True, True], "b": [True, False], "c": [False, False]}
    words = verdict_table([[claim, "1", of_seeds] for claim, of_seeds in held.items()])
    answers = [line.split(" | ")[-1] for line in words.splitlines()[2:]]
    assert answers == ["yes |", "**in 1 of 2 seeds** |", "**no** |"]


@pytest.mark.parametrize("name", ["table1", "robustness"])
def test_the_papers_numbers_stand_at_their_bars(name):
    plan, rows = EXPERIMENTS[name], []
    keys = list(plan.columns.values())
    for cell in plan.cells:
        rows.append(cell.labels | {"seed": 0, "log": []} | dict(zip(keys, plan.paper[cell.name])))
    (axis,) = plan.draw(rows).axes
    middles = [round(bar.get_x() + bar.get_width() / 2, 3) for bar in axis.patches]
    bars = dict(zip(middles, (bar.get_height() for bar in axis.patches)))
    lines = [line.get_xydata() for line in axis.lines if len(line.get_xydata()) == 2]
    assert len(bars) == len(lines) == len(keys) * len(plan.cells)
    for (left, height), (right, _) in lines:
        assert bars[round((left + right) / 2, 3)] == pytest.approx(height)


SCRIPT = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
Path("calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if flags.get("--seed") == "7": sys.exit("out of luck")
step = Path(flags["--out"]) / "step-3"
step.mkdir(parents=True)
made_by = {"update": 3, "total": 3, "strategy": flags["--strategy"], "seed": int(flags["--seed"])}
(step / "training.json").write_text(json.dumps(made_by))
"""


def test_what_is_finished_stays_and_what_is_not_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    (tmp_path / "train_sft.py").write_text(SCRIPT)
    lab = Experiment("x", ReproduceConfig(jobs=2))
    runs = [lab.sft("F", seed) for seed in range(2)]
    assert lab.sft("F", 0) is runs[0], "one run for two cells"
    interrupted = runs[1].output / "step-1"
    interrupted.mkdir(parents=True)
    (interrupted / "training.json").write_text(made_by(runs[1], update=1))
    run_commands([*lab.runs.values()], lab.config)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted("--resume" in call for call in calls) == [False, True]
    assert all(run.finished() for run in runs), "nothing is done twice"
    assert str(runs[0]) in capsys.readouterr().out
    assert 0 <= float(runs[0].minutes_file.read_text()) < 1
    assert not runs[1].minutes_file.exists(), "how long it took before it was killed is not known"

    cut = lab.compare(runs[0], runs[1], 0)
    cut.output.write_text('{\n  "first": {\n    "pass@1": 1.0\n  }\n')  # as a full disk leaves it
    assert not cut.finished()
    cut.output.write_text('{\n  "first": 1.0\n}\n')
    assert cut.finished()

    other = Experiment("x", ReproduceConfig(model="b/a"))
    other = other.add("train_sft.py", runs[0].output, model="b/a", out=runs[0].output)
    (runs[0].output / "step-3" / "training.json").write_text(made_by(other, model="org/a"))
    with pytest.raises(SystemExit):
        other.finished()
    assert "--model org/a, not b/a" in capsys.readouterr().err

    lab = Experiment("x", ReproduceConfig())
    lab.sft("F", 7)
    with pytest.raises(SystemExit) as stop:
        run_commands([*lab.runs.values()], lab.config)
    assert stop.value.code == 2 and "out of luck" in capsys.readouterr().err


PATIENT = """
import sys, time
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
begun = lambda: Path("calls").read_text().split() if Path("calls").exists() else []
Path("calls").open("a").write(Path(flags["--out"]).name + "\\n")
if "--init" in flags and not Path(flags["--init"], "done").exists(): sys.exit("no start yet")
name = Path(flags["--out"]).name
if name == "sft-B-0": sys.exit("out of luck")
awaited = {"sft-F-0": "sft-FB-0-rl", "sft-FB-0": "sft-F-0"}.get(name)
deadline = time.time() + 20
while awaited and awaited not in begun():
    if time.time() > deadline: sys.exit(f"{name} waits for {awaited}")
    time.sleep(0.05)
Path(flags["--out"]).mkdir(parents=True)
Path(flags["--out"], "done").touch()
"""


def test_rl_begins_once_its_own_sft_has_ended(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    for script in ("train_sft.py", "train_grpo.py"):
        (tmp_path / script).write_text(PATIENT)
    lab = Experiment("x", ReproduceConfig(jobs=2))
    for model in ("F", "FB"):
        lab.rl(lab.sft(model, 0), 0)
    run_commands([*lab.runs.values()], lab.config)
    begun = (tmp_path / "calls").read_text().split()
    assert sorted(begun[:2]) == ["sft-F-0", "sft-FB-0"]
    assert begun[2:] == ["sft-FB-0-rl", "sft-F-0-rl"]

    lab = Experiment("x", ReproduceConfig(jobs=1))
    start = lab.sft("B", 0)
    first = lab.rl(start, 0, parts="2-3")
    second = lab.rl(first, 0, parts="3-5")
    assert second.reads == {first.output}
    assert lab.compare(start, second, 0).reads == {start.output, second.output}
    lab.sft("FB", 1)
    line = refusal(lambda: run_commands([*lab.runs.values()], lab.config), capsys)
    assert "sft-B-0 failed" in line
    assert (tmp_path / "calls").read_text().split()[4:] == ["sft-B-0"], "nothing more is begun"


def test_one_model_alone_and_then_the_others(tmp_path, monkeypatch, capsys):
    """Claims without their rows are left out; without --only all is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    for only, models in (("FB", ["FB"]), ("F", ["F"]), ("", ["FB", "F", "B"])):
        main(ReproduceConfig(["table1"], model="some/model", laptop=True, only=only))
        folder = Path("paper/results/table1-model")
        result, text = read_json(folder / "table1.json"), (folder / "table1.md").read_text()
        assert {row["model"] for row in result["rows"]} == set(models)
        assert len(result["rows"]) == 3 * len(models) and text in capsys.readouterr().out
        assert text.count("\npython train_sft.py ") == len(models)
        claims = [claim for claim, *_ in result["claims"]]
        assert sum("F improves" in claim for claim in claims) == ("F" in models)
        assert any("best of the nine" in claim for claim in claims) == (len(models) == 3)
        assert any("selection" in claim for claim in claims) == ("FB" in models)
    asked = []
    monkeypatch.setattr(reproduce, "run_commands", lambda left, config: asked.extend(left))
    main(ReproduceConfig(["table1"], model="some/model", laptop=True))
    assert not asked, "nothing is done twice"


def test_a_laptop_evaluates_less_and_keeps_to_its_own_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lab = Experiment("x", ReproduceConfig(model="some/model", laptop=True))
    sft = lab.sft("FB", 0)
    rl = lab.rl(sft, 0, difficulty="hard")
    assert sft.command()[5:9] == ["--model", "some/model", "--laptop", "--epochs"]
    assert rl.command()[3:7] == ["--seed", "0", "--laptop", "--updates"]
    comparison = str(lab.compare(sft, rl, 5))
    assert "--problems 128 --seed 5" in comparison and "--laptop" not in comparison
    paper = Experiment("x", ReproduceConfig(model="some/model"))
    for meta, mine, other in ((True, lab, paper), (False, paper, lab)):
        folder = sft.output / "step-3"
        folder.mkdir(parents=True, exist_ok=True)
        mine_was = made_by(mine.sft("FB", 0), out="where it was moved from")
        (folder / "training.json").write_text(mine_was)
        assert mine.sft("FB", 0).finished()
        line = refusal(other.sft("FB", 0).finished, capsys)
        assert f"made with --laptop {meta}, not {not meta}: move it away" in line


def test_a_run_by_other_defaults_or_without_its_start_is_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lab = Experiment("x", ReproduceConfig(only="FB"))
    sft = lab.sft("FB", 0, field=13)
    rl = lab.rl(sft, 0, difficulty="hard")
    folder = sft.output / "step-2400"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(made_by(sft))
    assert sft.finished()
    (folder / "training.json").write_text(made_by(sft, lr=0.5))
    line = refusal(sft.finished, capsys)
    assert f"made with --lr 0.5, not {sft.settings().lr}: move it away" in line

    assert rl.settings().updates == 300
    folder = rl.output / "step-300"
    folder.mkdir(parents=True)
    gone = {"init_sha256": "0", "init_from": "ckpt/gone"}
    (folder / "training.json").write_text(made_by(rl, **gone))
    assert "weights that are gone from ckpt/gone: move it away" in refusal(rl.finished, capsys)


def test_every_experiment_also_trains_a_pretrained_model_on_a_laptop(tmp_path, monkeypatch):
    """Bug: SFT with a number of updates of its own was given epochs, too, and refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    for cell in (cell for plan in EXPERIMENTS.values() for cell in plan.cells):
        lab = Experiment("x", ReproduceConfig(model="some/model", laptop=True))
        sft = lab.sft(cell.model, 0, **cell.sft)
        rl = lab.rl(sft, 0, **cell.rl)
        assert (sft.settings().epochs is None) == ("updates" in cell.sft)
        assert sft.settings().laptop and rl.settings().lora_dropout == 0


def test_all_leaves_out_what_does_not_train_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run_commands", leave_results)
    main(ReproduceConfig(["all"], only="F"))
    names = {"table1", "dynamics", "gf13", "robustness"}
    assert {folder.name for folder in Path("paper/results").iterdir()} == names
    assert capsys.readouterr().out.count("trains no model F") == len(EXPERIMENTS) - len(names)


STOPPABLE = """
import signal, sys, time
from pathlib import Path
def save(*_):
    time.sleep(0.3)
    Path("saved").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, save)
Path("calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(60)
"""
EVENING = """
from pathlib import Path
from lib.flags import quiet_pipes
from paper import reproduce
reproduce.ROOT = Path.cwd() / "scripts"
lab = reproduce.Experiment("x", reproduce.ReproduceConfig(model="some/model"))
lab.sft("F", 0), lab.sft("B", 0)
with quiet_pipes():
    reproduce.run_commands([*lab.runs.values()], lab.config)
"""


def test_ctrl_c_waits_for_what_runs_and_starts_nothing_more(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train_sft.py").write_text(STOPPABLE)
    environment = os.environ | {"PYTHONPATH": str(Path(reproduce.__file__).parent.parent)}
    options = {"cwd": tmp_path, "env": environment, "start_new_session": True, "text": True}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", EVENING], **options, **pipes)
    while not (tmp_path / "calls").exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and (tmp_path / "saved").exists()
    (line,) = err.splitlines()
    assert "the same command goes on from here" in line
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    heading, *commands = out.splitlines()
    assert "2 commands are left" in heading and len(commands) == 2


def test_list_and_refusals(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list"])
    main(parse_flags(ReproduceConfig, "", "experiment"))
    out = capsys.readouterr().out
    assert all(name in out for name in EXPERIMENTS)
    for flags, says in (
        ([], "name an experiment"),
        (["table9"], "table9"),
        (["table1", "--seeds", "0"], "--seeds"),
        (["table1", "--only", "G"], "--only G: there are B, F, FB"),
        (["all", "--only", "G"], "--only G: there are B, F, FB"),
        (["table1", "--laptop"], "--laptop needs a --model"),
    ):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
        with pytest.raises(SystemExit) as stop:
            main(parse_flags(ReproduceConfig, "", "experiment"))
        assert stop.value.code == 2 and says in capsys.readouterr().err


def test_a_pretrained_model_is_evaluated_at_the_temperature_of_its_rl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model, says in (("some/model", True), ("", False)):
        lab = Experiment("x", ReproduceConfig(model=model))
        sft = lab.sft("FB", 0)
        assert ("--temperature 0.7" in str(lab.compare(sft, lab.rl(sft, 0), 5))) == says
