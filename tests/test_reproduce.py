"""The experiments' tables and verdicts on made-up results, and that what is finished is not run again."""

import json
import sys
from pathlib import Path

import pytest

import reproduce
from data.finite_field import EVALUATION, FITTING, INVERSION
from eval import compare, summarise
from reproduce import EXPERIMENTS, Lab, ReproduceConfig, main
from runtime import parse_flags
from strategies import Response
from train_grpo import behaviour

OTHER = {"forward": "backward", "backward": "forward"}


def responses(shown: str, share: float, skill: float, kinds=(EVALUATION, INVERSION) * 10) -> list[list[Response]]:
    """Ten responses to each problem of a model that was shown one strategy or both, in fixed proportions."""
    judged = []
    for i, kind in enumerate(kinds):
        fitting, group = FITTING[kind], []
        for j in range(10):
            strategy = shown if shown != "mixed" else fitting if j < 10 * share else OTHER[fitting]
            right = j % 5 < 5 * skill if strategy == fitting else j == 5
            group.append(
                Response(kind, 6 + i % 4, strategy, strategy == fitting, right, None if right else "order", True)
            )
        judged.append(group)
    return judged


class FakeLab(Lab):
    """Instead of running commands, writes what they would leave."""

    good = True  # a world in which the paper's claims hold

    def run(self) -> None:
        for run in self.runs.values():
            told = dict(zip(run.flags[::2], run.flags[1::2])) if run.script != "eval.py" else {}
            shown = next((s for s in ("forward", "backward") if f"-{s[0].upper()}-" in str(run.place)), "mixed")
            harder = self.good and ("-rl-difficulty-easy" not in str(run.place) or "parts-3-5" in str(run.place))
            seeded = "parts-1-" in str(run.place) or "parts" not in str(run.place)
            before = responses(shown, 0.5, 0.6 if seeded else 0.0)
            after = responses(shown, 1.0 if self.good else 0.6, (1.0 if harder else 0.6) if seeded else 0.0)
            run.place.parent.mkdir(parents=True, exist_ok=True)
            if run.script == "train_grpo.py":
                run.place.mkdir(exist_ok=True)
                share = float(told.get("--evaluation-share", 0.5))
                kinds = [EVALUATION] * round(20 * share) + [INVERSION] * (20 - round(20 * share))
                after = responses(shown, 1.0 if self.good else 0.6, 1.0, kinds)
                rows = [{"update": u, "reward": 0.9} | behaviour(after) for u in range(1, 31)]
                (run.place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            elif run.script == "eval.py":
                if "evaluation_share" in str(run.place):  # the forward share follows the data here too
                    kinds = [EVALUATION] * (20 if "0.9" in str(run.place) else 16)
                    after = responses("mixed", 1.0, 1.0, kinds + [INVERSION] * (20 - len(kinds)))
                result = {"before": summarise(before), "after": summarise(after)}
                run.place.write_text(json.dumps(result | {"difference": compare(before, before)}))


@pytest.mark.parametrize("good", [True, False])
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_tables_and_verdicts(name, good, tmp_path, monkeypatch, capsys):
    """Where the claims hold they are found to hold, where they do not at least one is found not to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "Lab", FakeLab)
    monkeypatch.setattr(FakeLab, "good", good)
    main(ReproduceConfig([name], seeds=2))
    result = json.loads((tmp_path / "results" / name / f"{name}.json").read_text())
    verdicts = [holds for _, _, holds in result["claims"]]
    assert result["seeds"] == 2 and result["rows"] and verdicts
    text = (tmp_path / "results" / name / f"{name}.md").read_text()
    assert "python train_grpo.py" in text and text in capsys.readouterr().out
    assert (tmp_path / "results" / name / f"{name}.png").stat().st_size > 5_000
    if name == "gf13":
        verdicts = verdicts[1:]  # no model of one strategy can reach what the paper says of it
    if name != "amplification":  # whose two worlds differ in their data alone
        assert all(verdicts) == good, result["claims"]


def test_table1_has_the_rows_that_others_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "Lab", FakeLab)
    main(ReproduceConfig(["table1"], seeds=1))
    rows = json.loads(Path("results/table1/table1.json").read_text())["rows"]
    assert len(rows) == 9
    assert {(r["model"], r["stage"]) for r in rows} == set(reproduce.PAPER_TABLE1)
    best = next(r for r in rows if (r["model"], r["stage"]) == ("FB", "RL 6-9"))
    assert (best["all"], best["inversion"], best["evaluation"], best["seed"]) == (100, 100, 100, 0)
    sft = next(r for r in rows if (r["model"], r["stage"]) == ("F", "SFT"))
    assert sft["evaluation"] == pytest.approx(60) and sft["inversion"] == pytest.approx(10)


SCRIPT = """
import json, sys
from pathlib import Path
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
Path("calls").open("a").write(" ".join(sys.argv[1:]) + "\\n")
if flags.get("--seed") == "7": sys.exit("out of luck")
step = Path(flags["--out"]) / "step-3"
step.mkdir(parents=True)
(step / "training.json").write_text(json.dumps({"update": 3, "total": 3}))
"""


def test_what_is_finished_stays_and_what_is_not_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "HERE", tmp_path)
    (tmp_path / "train_sft.py").write_text(SCRIPT)
    lab = Lab("x", ReproduceConfig(jobs=2))
    runs = [lab.sft("F", seed) for seed in range(2)]
    assert lab.sft("F", 0) is runs[0], "one run for two cells"
    begun = runs[1].place / "step-1"
    begun.mkdir(parents=True)
    (begun / "training.json").write_text('{"update": 1, "total": 3}')
    lab.run()
    calls = (tmp_path / "calls").read_text().splitlines()
    assert sorted("--resume" in call for call in calls) == [False, True]
    lab.run()
    assert len((tmp_path / "calls").read_text().splitlines()) == 2, "nothing is done twice"
    assert str(runs[0]) in capsys.readouterr().out

    cut = lab.compare(runs[0], runs[1])
    cut.place.write_text('{\n  "first": {\n    "pass@1": 1.0\n  }\n')  # as a full disk leaves it
    assert not cut.finished()
    cut.place.write_text('{\n  "first": 1.0\n}\n')
    assert cut.finished()

    lab.sft("F", 7)
    with pytest.raises(SystemExit) as stop:
        lab.run()
    assert stop.value.code == 2 and "out of luck" in capsys.readouterr().err


def test_list_and_refusals(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--list"])
    main(parse_flags(ReproduceConfig, "", "experiment"))
    out = capsys.readouterr().out
    assert all(name in out for name in EXPERIMENTS) and "not run yet" in out
    for flags, says in (([], "name an experiment"), (["table9"], "table9"), (["table1", "--seeds", "0"], "--seeds")):
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
        with pytest.raises(SystemExit) as stop:
            main(parse_flags(ReproduceConfig, "", "experiment"))
        assert stop.value.code == 2 and says in capsys.readouterr().err
