"""Plots of logs and evaluations; files that are not logs are refused."""

import json
import sys

import numpy as np
import pytest
from conftest import response

from data.finite_field import EVALUATION, FORWARD, INVERSION
from eval import rollout_metrics, summarise
from lib import plots
from lib.flags import parse_flags
from lib.plots import PANELS, PlotConfig, plot_training, smooth
from lib.responses import Response


def log(n: int, kl: bool) -> list[dict]:
    """A log as train_grpo.py writes it; compositions and inversions come and go."""
    rows = []
    for update in range(1, n + 1):
        kind = ("evaluation", "inversion")[update % 2]
        scored = [[response(kind, 6, "forward", kind == "evaluation", True, None, True)] * 2]
        row = {
            "update": update,
            "reward": 0.5,
            "frac_reward_zero_std": 0.1,
            "entropy": 0.1,
            "response_length": 9.0,
        }
        rows.append(row | rollout_metrics(scored) | ({"kl": 0.01} if kl else {}))
    return rows


def test_the_trainer_logs_what_every_panel_shows():
    logged = {key for row in log(4, True) for key in row}
    for title, metric in PANELS.items():
        of_types = {metric.replace("*", kind) for kind in (EVALUATION, INVERSION)}
        assert of_types <= logged, title


def test_the_bars_of_the_causes_are_stacked():
    def part(mean):
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1]}

    parts = {
        "gain": 0.3,
        "selection": 0.2,
        "improvement": 0.1,
        "arithmetic": -0.1,
        "procedure": 0.15,
        "guess": 0.05,
    }
    overall = {name: part(mean) for name, mean in parts.items()}
    _, (axis,) = plots.new_figure(4, 4, 1, 1)
    reasons = {"overall": overall, "by_type": {"evaluation": overall}, "by_difficulty": {}}
    guessed = {name: part(mean + 0.05) for name, mean in parts.items()}
    plots.draw_reasons(axis, reasons, reasons | {"overall": guessed})
    bars = [
        (bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in axis.patches
    ]
    for x in (0, 1):
        here = [(y, height) for at, y, height in bars if at == pytest.approx(x + 0.2)]
        assert here == [pytest.approx(bar) for bar in ((0, -0.1), (0, 0.15), (0.15, 0.05))]
        assert (0, 0.2) in [(y, height) for at, y, height in bars if at == pytest.approx(x - 0.2)]
    (gain,) = (line for line in axis.lines if line.get_label().startswith("gain"))
    assert gain.get_ydata() == pytest.approx([0.3, 0.3])
    crosses = [line.get_ydata() for line in axis.lines if line.get_marker() == "x"]
    assert np.array(crosses) == pytest.approx(np.array([[0.25, 0.2], [0.15, 0.1]]))
    intervals = [line[:, 1] for lines in axis.collections for line in lines.get_segments()]
    assert np.array(intervals) == pytest.approx(np.array([[0.1, 0.3]] * 2 + [[0, 0.2]] * 2))


def test_running_means_keep_constants_and_ends():
    assert smooth(np.full(50, 0.3), 7) == pytest.approx(np.full(50, 0.3))
    assert smooth(np.array([1.0]), 5) == pytest.approx([1.0])
    assert smooth(np.arange(9.0), 3) == pytest.approx([0.5, 1, 2, 3, 4, 5, 6, 7, 7.5])


def test_one_run_or_many(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, rows in (("a", log(30, True)), ("b", log(3, False))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    for runs in (["a"], ["a", "b"]):
        monkeypatch.setattr(sys, "argv", ["plot.py", *runs, "--out", "p.png"])
        plots.main(parse_flags(PlotConfig, "", "runs"))
        assert (tmp_path / "p.png").stat().st_size > 20_000
    assert "a (30 updates), b (3 updates)" in capsys.readouterr().out
    plot_training({"one": log(1, False)}, tmp_path / "short.png")


def test_a_panel_of_ones_own_is_drawn(tmp_path, monkeypatch):
    """Bug: the figure had room for eight, and the ninth was left out without a word."""
    monkeypatch.setitem(plots.PANELS, "mean length", "response_length")
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    plot_training({"one": log(3, False)}, tmp_path / "p.png")
    shown = [axis.get_title() for axis in figures[0].axes if axis.get_visible()]
    assert shown == [*plots.PANELS]


@pytest.mark.parametrize("label", ["_other", "", "$1", "\ud800"])
def test_any_label_has_its_place_in_a_legend(label):
    _, (axis,) = plots.new_figure(2, 2, 1, 1)
    axis.plot([0], [0], label=plots.plain(label))
    assert len(axis.get_legend_handles_labels()[1]) == 1


@pytest.mark.parametrize(
    "written, says",
    [
        (None, "no run folder"),
        ("", "not the log"),
        ('{"update": 1}\n', "not the log"),
        ('{"reward": 1}\n', "not the log"),
        ('{"update": 1, "reward": "a"}\n', "not the log"),
        ('{"update": 1, "reward": 1, "kl": [1]}\n', "not the log"),
        ('{"update": 1, "reward": 1' + "0" * 400 + "}\n", "not the log"),
    ],
)
def test_what_is_no_log_is_refused(written, says, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    if written is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(written)
    with pytest.raises(SystemExit) as stop:
        plots.main(PlotConfig([str(tmp_path / "run")], str(tmp_path / "p.png")))
    assert (
        stop.value.code == 2
        and says in capsys.readouterr().err
        and not (tmp_path / "p.png").exists()
    )


def test_some_types_may_have_no_difficulty():
    """Bug: the figure of such a file was a traceback."""
    groups = [[Response("", "sum", name, True, True)] for name in ("10 terms", "9 terms")]
    groups.append([Response("", "word", "", True, True)])
    _, (axis,) = plots.new_figure(4, 4, 1, 1)
    plots.draw_accuracy(axis, dict.fromkeys(("before", "after"), summarise(groups)))
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["9\nterms", "10\nterms", "all"]


def test_validation_of_another_type_is_drawn_and_the_kl_panel_is_true(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    nothing = {"update": 1, "reward": 0.0, "accuracy/sum": 0.0, "validation/word": 0.5}
    for entropy, says in ((None, "no values"), (0.1, "not computed: --beta is 0")):
        plot_training({"one": [nothing | {"entropy": entropy}]}, tmp_path / "p.png")
        panels = dict(zip(PANELS.values(), figures.pop().axes))
        (text,) = panels["kl"].texts
        assert text.get_text() == says
        heights = [line.get_ydata() for line in panels["accuracy/*"].lines if len(line.get_ydata())]
        assert [0.5] in [[*height] for height in heights]


def test_curves_of_pass_at_k_are_each_their_own():
    scored = []
    for right in (0, 3, 8):
        errors = [None if i % 2 else "order" for i in range(16)]
        one = [response(EVALUATION, 6, FORWARD, True, i < right, x) for i, x in enumerate(errors)]
        scored.append(one)
    summary = summarise(scored)
    _, (axis,) = plots.new_figure(4, 4, 1, 1)
    plots.draw_pass_at_k(axis, {"": summary})
    for line, what in zip(axis.lines, ("pass", "verified"), strict=True):
        expected = [summary["overall"][f"{what}@{k}"] for k in (1, 2, 4, 8, 16)]
        assert list(line.get_ydata()) == expected


def test_bars_of_openings_are_of_their_policy():
    openings = {
        which: {EVALUATION: {FORWARD: {"access": {"mean": x, "ci95": [x, x]}}}}
        for which, x in (("before", 0.1), ("after", 0.9))
    }
    _, (axis,) = plots.new_figure(4, 4, 1, 1)
    plots.draw_openings(axis, openings, "access")
    assert [bar.get_height() for bar in axis.patches] == [0.1, 0.9]
