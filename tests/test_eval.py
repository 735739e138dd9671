"""Metrics against counts made by hand, intervals against simulation, tables and files."""

import itertools
import json
import math
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import response, score_groups, small_model, word_tokenizer

import eval as evaluation
from data.finite_field import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    INVERSION,
    MATCHING_STRATEGY,
    Task,
    is_validation,
)
from eval import (
    EvalConfig,
    Evaluation,
    compare,
    decompose_gain,
    main,
    metrics_of,
    report,
    rollout_metrics,
    summarise,
)
from lib.distributed import World
from lib.gain import paired_difference
from lib.responses import Response
from lib.rng import rng
from lib.run_dir import choose_checkpoints, describe_start, save_checkpoint
from lib.stats import mean_interval, pass_at_k, wilson
from lib.tables import comparison_table, openings_table, rows_of, table
from strategies import GUESS, score_response

ONE = World(0, 1, torch.device("cpu"))


def test_pass_at_k_is_the_mean_over_all_choices():
    """Compare with the mean over every choice of k among n responses."""
    for n, c, k in [(4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 1), (5, 3, 5)]:
        outcomes = [True] * c + [False] * (n - c)
        expected = fmean(any(chosen) for chosen in itertools.combinations(outcomes, k))
        assert pass_at_k(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize("p", [0.02, 0.5, 0.9, 0.99])
def test_intervals_hold_the_truth_in_95_of_100_cases(p):
    rng, n, held = random.Random(0), 200, 0
    for _ in range(2000):
        low, high = wilson(fmean(rng.random() < p for _ in range(n)), n)
        held += low <= p <= high
    assert 0.92 < held / 2000 < 0.99
    assert wilson(1.0, 100)[1] == pytest.approx(1.0) and wilson(1.0, 100)[0] < 0.97


@pytest.mark.parametrize("n, gained, lost", [(20, 0.02, 0.02), (60, 0.3, 0.05), (200, 0.0, 0.01)])
def test_paired_intervals_hold_the_truth(n, gained, lost):
    rng, held = random.Random(0), 0
    for _ in range(400):
        changes = rng.choices(
            ((False, True), (True, False), (True, True)), (gained, lost, 1 - gained - lost), k=n
        )
        before, after = (
            [[response(EVALUATION, 6, FORWARD, True, r, None, True)] for r in side]
            for side in zip(*changes)
        )
        low, high = paired_difference(before, after)["ci95"]
        held += low <= gained - lost <= high
    assert held / 400 > 0.92


def responses(seed: int = 0, n: int = 60, samples: int = 4):
    """Return problems and texts: half of the texts match, the others guess wrong."""
    rng = random.Random(seed)
    problems = [Task().sample(rng, "validation") for _ in range(n)]
    texts = []
    for i, problem in enumerate(problems):
        matching = MATCHING_STRATEGY[problem.kind]
        other = BACKWARD if matching == FORWARD else FORWARD
        wrong = (problem.parts[0].asked + 1) % 11
        for j in range(samples):
            good = (i + j) % 2 == 0
            texts.append(problem.solution(matching) if good else problem.solution(other, [wrong]))
    return problems, texts


def test_metrics_are_those_counted_by_hand():
    problems, texts = responses()
    summary = summarise(score_groups(problems, texts, [True] * len(texts)))
    overall = summary["overall"]
    assert (
        overall["pass@1"] == overall["match_rate"] == 0.5 and overall["accuracy_given_match"] == 1.0
    )
    assert overall["pass@2"] == pytest.approx(1 - 1 / 6) and overall["pass@4"] == 1.0
    assert (overall["problems"], overall["samples"]) == (60, 4) and overall["errors"] == {
        GUESS: 120
    }
    for kind, c in summary["by_type"].items():
        assert c["problems"] == sum(problem.kind == kind for problem in problems)
        assert c["forward_share"] == c["backward_share"] == 0.5
    assert set(summary["by_difficulty"]) == {p.difficulty for p in problems}
    n_evaluation = 4 * sum(p.kind == EVALUATION for p in problems)
    forward = summary["by_strategy"][FORWARD]
    assert forward["responses"] == 120 and forward["accuracy"] == pytest.approx(n_evaluation / 240)
    low, high = overall["ci95"]
    assert low < 0.5 < high and high - low < 0.26


def test_rollout_metrics_are_those_counted_by_hand():
    def group(kind, *responses):
        return [
            response(kind, 6, strategy, matches, right) for strategy, matches, right in responses
        ]

    scored = [
        group(
            "evaluation",
            ("forward", True, True),
            ("forward", True, False),
            ("backward", False, True),
        ),
        group(
            "evaluation",
            ("none", False, False),
            ("forward", True, True),
            ("backward", False, False),
        ),
        group(
            "inversion",
            ("forward", False, False),
            ("forward", False, True),
            ("mixed", False, False),
        ),
    ]
    metrics = rollout_metrics(scored)
    expected = {
        "accuracy/evaluation": 3 / 6,
        "accuracy_given_match/evaluation": 2 / 3,
        "match_rate/evaluation": 3 / 6,
    }
    expected |= {
        "forward/evaluation": 3 / 6,
        "backward/evaluation": 2 / 6,
        "none/evaluation": 1 / 6,
    }
    expected |= {
        "accuracy_given_forward/evaluation": 2 / 3,
        "accuracy_given_backward/evaluation": 1 / 2,
    }
    expected |= {"match_rate/inversion": 0, "forward/inversion": 2 / 3, "mixed/inversion": 1 / 3}
    expected |= {"forward/all": 5 / 9, "accuracy_at/6 steps": 4 / 9}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (
        metrics["accuracy_given_match/inversion"] is None
        and metrics["accuracy_given_backward/inversion"] is None
    )


def test_no_matching_response_means_no_accuracy():
    problem = Task().validation(1, rng(0, "validation problems"))[0]
    other = BACKWARD if problem.kind == EVALUATION else FORWARD
    metrics = metrics_of([[score_response(problem, problem.solution(other), True)]])
    assert metrics["accuracy_given_match"] is None
    assert "-" in table(summarise([[score_response(problem, "", True)]]))


def test_pairs_are_compared_problem_by_problem():
    problems, texts = responses(samples=2)
    right = [
        problem.solution(MATCHING_STRATEGY[problem.kind]) for problem in problems for _ in range(2)
    ]
    before = score_groups(problems, texts, [True] * len(texts))
    after = score_groups(problems, right, [True] * len(right))
    change = compare(before, after)["overall"]
    low, high = change["ci95"]
    assert change["pass@1"] == 0.5 and 0.4 < low < 0.5 < high < 0.6, (
        "every problem gains exactly one half"
    )
    low, high = paired_difference(after[:20], after[:20])["ci95"]
    assert -low == pytest.approx(high) and 0.05 < high < 0.2, (
        "twenty problems without a change do not prove that there is none"
    )
    assert compare(before, after)["by_type"].keys() == summarise(before)["by_type"].keys()


def test_a_type_and_a_difficulty_of_one_name_have_a_row_each():
    parts = {"overall": 1, "by_type": {"hard": 2}, "by_difficulty": {"hard": 3, "easy": 4}}
    assert rows_of(parts) == {"all": 1, "hard": 2, "difficulty hard": 3, "easy": 4}


def test_the_table_shows_what_was_gained_and_why():
    """Half of the responses match before, all of them after: the gain is selection alone."""
    problems, texts = responses()
    right = [
        problem.solution(MATCHING_STRATEGY[problem.kind]) for problem in problems for _ in range(4)
    ]
    scored = [score_groups(problems, some, [True] * len(some)) for some in (texts, right)]
    metrics = dict(zip(("before", "after"), map(summarise, scored)))
    metrics |= dict.fromkeys(("reasons", "imputed"), decompose_gain(*scored))
    text = comparison_table(metrics | {"difference": compare(*scored)})
    (cells,) = (re.split("  +", line) for line in text.splitlines() if line.startswith("all  "))
    assert cells[1:4] == ["50.0 -> 100.0", "50.0 -> 100.0", "100.0 -> 100.0"]
    assert cells[4].startswith("+50.0 (") and cells[5].startswith("+50.0 (")
    assert cells[6].startswith("+0.0 (")
    *_, causes, verified = text.splitlines()
    causes = causes.split("improvement by ")[1].split(", ")
    assert [float(x.split()[1]) for x in causes] == [0, 0, 0]
    assert "verified@1 50.0 -> 100.0, verified@4 100.0 -> 100.0" in verified
    assert verified.endswith("problems solved only after: 0, only before: 0")


def test_verified_is_right_without_a_wrong_line_or_a_guess():
    """Lucky guesses and skipped steps count as right alone; what no sample solves, as lost."""
    problems, _ = responses()
    groups = []
    for problem in problems:
        matching = MATCHING_STRATEGY[problem.kind]
        good = problem.solution(matching)
        lucky = problem.solution(BACKWARD if matching == FORWARD else FORWARD)
        skipped = "\n".join([*good.splitlines()[:1], *good.splitlines()[2:]])
        groups.append([good, lucky, skipped, skipped])
    scored = score_groups(problems, sum(groups, []), [True] * 4 * len(problems))
    metrics = metrics_of(scored)
    assert (metrics["pass@1"], metrics["verified@1"]) == (1.0, 0.25)
    assert metrics["verified@2"] == pytest.approx(0.5)
    low, high = metrics["intervals"]["verified@4"]
    assert metrics["verified@4"] == 1.0 == pytest.approx(high) and low < 0.96
    unsolved = score_groups(problems, [group[1] for group in groups], [True] * len(problems))
    change = compare(unsolved, scored)["overall"]
    assert (change["solved"], change["lost"]) == (len(problems), 0), "guesses solve nothing"
    assert rollout_metrics(scored)["verified"] == rollout_metrics(scored)["verified/evaluation"]


def test_validation_problems_are_distinct_and_of_their_stream():
    problems = Task((2, 2)).validation(200, rng(0, "validation problems"))
    assert len({(p.field, p.parts) for p in problems}) == 200 and all(map(is_validation, problems))
    assert (
        problems
        == Task((2, 2)).validation(200, rng(0, "validation problems"))
        != Task((2, 2)).validation(200, rng(1, "validation problems"))
    )
    few = Task((1, 1), p=3).validation(200, rng(0, "validation problems"))
    assert 0 < len(few) < 200, "a small task has no 200 problems"


def test_every_solution_fits_the_token_budget(model, tokenizer):
    """The longest solution of any problem leaves less than a line of room."""
    for task in (Task((6, 9)), Task((2, 4), parts=(1, 4)), Task((6, 15))):
        budget = tokenizer.max_response_tokens(task, 2048)
        problems = [
            replace(task, steps=task.steps[1:] * 2, parts=task.parts[1:] * 2).sample(
                random.Random(i), "train"
            )
            for i in range(50)
        ]
        longest = max(
            len(tokenizer.solution(p.solution(s))) for p in problems for s in (FORWARD, BACKWARD)
        )
        assert longest < budget <= longest + 8
    with pytest.raises(SystemExit):
        tokenizer.max_response_tokens(Task((6, 9)), 64)


def save(run: Path, update: int, **meta) -> Path:
    """Write RUN/step-UPDATE with random weights."""
    model = small_model(update)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = (run, update, model, word_tokenizer(11), optimizer, {"field": 11} | meta)
    return save_checkpoint(*saved).result()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    for update in (2, 10):
        save(run, update)
    return run


def test_a_folder_of_runs_means_the_newest_run_and_its_start(tmp_path, monkeypatch, capsys):
    """A run without a start is taken alone, as is a run or a checkpoint that is named directly."""
    monkeypatch.chdir(tmp_path)
    older, start = (save(Path("ckpt/sft"), update) for update in (2, 10))
    grpo = save(Path("ckpt/grpo"), 3, **describe_start(start, "", Path("ckpt/grpo")))

    def set_times(*folders: Path) -> None:
        for seconds, folder in enumerate(folders):
            os.utime(folder, (seconds, seconds))

    set_times(older, start, grpo)
    assert choose_checkpoints([]) == choose_checkpoints(["ckpt"]) == [start, grpo]
    assert choose_checkpoints(["ckpt/grpo"]) == choose_checkpoints([str(grpo)]) == [grpo]
    assert choose_checkpoints(["ckpt/sft"]) == [start]
    assert choose_checkpoints([str(older)]) == [older]
    assert choose_checkpoints(["ckpt/grpo", "ckpt/sft"]) == [grpo, start], "in the order given"
    inside = save(Path("ckpt/sft/rl"), 3)
    assert choose_checkpoints(["ckpt/sft"]) == [start], "a run, though another lies inside it"
    shutil.rmtree(inside.parent)
    set_times(grpo, older, start)
    assert choose_checkpoints(["ckpt"]) == [start], "the newest run has no start"
    assert capsys.readouterr().err == ""
    shutil.rmtree("ckpt/sft")
    assert choose_checkpoints(["ckpt"]) == [grpo] and "is gone" in capsys.readouterr().err


def test_command_evaluates_the_newest_checkpoint_and_writes_files(checkpoints, tmp_path, capsys):
    files = {"json": str(tmp_path / "a.json"), "plot": str(tmp_path / "a.png")}
    main(EvalConfig([str(checkpoints)], problems=12, samples=2, steps="1-2", **files), ONE)
    metrics = json.loads((tmp_path / "a.json").read_text())
    assert metrics["checkpoints"] == [str(checkpoints / "step-10")]
    for c in (
        metrics["overall"],
        metrics["by_type"]["evaluation"],
        metrics["by_difficulty"]["2 steps"],
    ):
        assert {
            "pass@1",
            "ci95",
            "problems",
            "forward_share",
            "backward_share",
            "accuracy_given_match",
        } <= c.keys()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "step-10" in capsys.readouterr().out


def test_command_compares_two(checkpoints, tmp_path, capsys):
    both = [str(checkpoints / "step-2"), str(checkpoints)]
    how = {"greedy": True, "temperature": 0.0, "json": str(tmp_path / "b.json")}
    main(EvalConfig(both, problems=8, steps="1-2", **how), ONE)
    metrics = json.loads((tmp_path / "b.json").read_text())
    assert metrics["before"]["overall"]["samples"] == 1
    assert metrics["difference"]["overall"]["problems"] == 8
    for group, value in (("overall", None), ("by_type", EVALUATION), ("by_difficulty", "2 steps")):
        reasons, difference = (metrics[name][group] for name in ("reasons", "difference"))
        reasons, difference = (x[value] if value else x for x in (reasons, difference))
        assert reasons["gain"]["mean"] == pytest.approx(difference["pass@1"])
    out = capsys.readouterr().out
    assert "step-2 -> " in out and "= selection" in out and "improvement by " in out


def test_a_report_says_what_was_gained_since_the_first(tmp_path):
    problems, texts = responses(samples=2)
    right = [p.solution(MATCHING_STRATEGY[p.kind]) for p in problems for _ in range(2)]
    scored = [score_groups(problems, some, [True] * len(some)) for some in (texts, right)]
    evaluations = {name: Evaluation(x, [[] for _ in x], None) for name, x in zip("ab", scored)}
    report(evaluations, tmp_path / "a.json", None)
    metrics = json.loads((tmp_path / "a.json").read_text())
    assert [metrics[side]["overall"]["pass@1"] for side in ("before", "after")] == [0.5, 1.0]
    assert metrics["difference"]["overall"]["pass@1"] == 0.5
    assert metrics["reasons"]["overall"]["gain"]["mean"] == pytest.approx(0.5)


def test_the_seed_is_that_of_problems_and_responses(checkpoints, monkeypatch):
    asked, sample = [], evaluation.Sampler.sample
    spy = lambda self, *args: asked.append(args) or sample(self, *args)  # noqa: E731
    monkeypatch.setattr(evaluation.Sampler, "sample", spy)
    main(EvalConfig([str(checkpoints)], problems=5, samples=1, steps="1-2", seed=3), ONE)
    ((prompts, keys),) = asked
    assert {key[0] for key in keys} == {3}
    problems = Task((1, 2)).validation(5, rng(3, "validation problems"))
    assert prompts == [word_tokenizer(11).prompt(problem) for problem in problems]


def test_the_interval_of_a_mean_by_hand():
    """That of the values and the two that are added, within its bounds."""
    half = 1.96 * math.sqrt(2 / 9 / 6)
    assert mean_interval([1, 1, 1, 0], (0.0, 1.0), 0.0) == pytest.approx([2 / 3 - half, 1.0])
    half = 1.96 * math.sqrt(3 / 16 / 4)
    assert mean_interval([0, 0], (0.0, 1.0), 0.0) == pytest.approx([0.0, 1 / 4 + half])


def test_the_log_holds_the_accuracy_of_all_responses():
    rights = ((True, False), (False, False), (True, False))
    scored = [[response("evaluation", 6, FORWARD, True, r) for r in group] for group in rights]
    assert rollout_metrics(scored)["accuracy"] == pytest.approx(2 / 6)


def test_the_table_has_a_column_for_each_strategy_that_was_taken():
    problems, texts = responses(n=8)
    for some, columns in ((texts, ["forward", "backward"]), ([""] * len(texts), ["none"])):
        heading, row, *_ = table(summarise(score_groups(problems, some, [True] * 32))).splitlines()
        heading, cells = (re.split("  +", line.strip()) for line in (heading, row))
        assert heading[3 : heading.index("matching")] == columns
        shares = map(float, cells[4 : 4 + len(columns)])
        assert sum(shares) == pytest.approx(100)


def own(label: str, right: bool, kind: str = "sum", difficulty: str = "") -> Response:
    """A response to a problem from a file."""
    return Response("", kind, difficulty, right, True, strategy=label)


@pytest.mark.parametrize("label", ["matching", "none"])
def test_a_task_of_ones_own_has_no_causes_and_without_labels_no_split(label, tmp_path):
    """Bug: a label called matching was taken for the paper's task, with verified@1 at 0."""
    scored = [[[own(label, right)] * 2 for right in rights] for rights in ([0, 1, 0], [1, 1, 0])]
    evaluations = {name: Evaluation(x, [[] for _ in x], None) for name, x in zip("ab", scored)}
    text = report(evaluations, tmp_path / "a.json", tmp_path / "a.png")
    assert "+33.3" in text and "verified" not in text and "arithmetic" not in text
    assert ("= selection" in text) == (label != "none")
    metrics = json.loads((tmp_path / "a.json").read_text())
    parts = metrics["reasons"].get("overall", {})
    assert [*parts] == ["gain", "selection", "improvement"] * (label != "none")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_two_policies_have_random_numbers_of_their_own(checkpoints, monkeypatch):
    """Bug: shared ones misled the split where one token decides strategy and success."""
    streams, sample = [], evaluation.Sampler.sample
    spy = lambda self, prompts, keys: streams.append(keys[0]) or sample(self, prompts, keys)  # noqa: E731
    monkeypatch.setattr(evaluation.Sampler, "sample", spy)
    both = [str(checkpoints / "step-2"), str(checkpoints)]
    main(EvalConfig(both, problems=4, samples=1, steps="1-2"), ONE)
    alone = streams[0]
    assert len(set(streams)) == len(streams) >= 2 and alone == (0, "evaluation sampling", 0)


def test_its_flags_reach_the_sampler(checkpoints, tmp_path, monkeypatch):
    made, templates, sampler, load = [], [], evaluation.Sampler, evaluation.load_model

    def make_sampler(*how):
        made.append(how)
        return sampler(*how)

    def load_model(*what):
        templates.append(what[3])
        return load(*what)

    monkeypatch.setattr(evaluation, "Sampler", make_sampler)
    monkeypatch.setattr(evaluation, "load_model", load_model)
    few = {"problems": 2, "samples": 1, "steps": "1-2", "max_new_tokens": 5}
    main(EvalConfig([str(checkpoints)], temperature=0.7, precision="bf16", **few), ONE)
    ((model, _, *how),) = made
    assert how == [1, 5, 0.7] and model.dtype == torch.bfloat16
    assert not any(weight.requires_grad for weight in model.parameters()), "so kernels may pack it"
    for then, now in ((False, True), (True, False)):  # as in training, or by the flag
        folder = save(tmp_path / str(then), 1, no_chat_template=then)
        main(EvalConfig([str(folder)], no_chat_template=now, **few), ONE)
    assert templates == [True, False, False]


def responses_of(kind: str, matching: int, right: int) -> list[list]:
    """Four responses to each of eight problems: so many match, so many of these are right."""
    way = MATCHING_STRATEGY[kind]
    other = {FORWARD: BACKWARD, BACKWARD: FORWARD}[way]
    group = [response(kind, 6, other, False, False, "wrong guess")] * (4 - matching)
    for i in range(matching):
        group.append(response(kind, 6, way, True, i < right, None if i < right else "arithmetic"))
    return [group] * 8


def test_each_row_of_a_table_is_of_its_group():
    """Evaluation is selected, inversion improves."""
    before = responses_of(EVALUATION, 2, 2) + responses_of(INVERSION, 4, 2)
    after = responses_of(EVALUATION, 4, 4) + responses_of(INVERSION, 4, 4)
    metrics = dict(zip(("before", "after"), map(summarise, (before, after))))
    metrics |= {"difference": compare(before, after), "reasons": decompose_gain(before, after)}
    imputed = json.loads(json.dumps(metrics["reasons"]))
    imputed["overall"]["selection"]["mean"] = 0.123
    text = comparison_table(metrics | {"imputed": imputed})
    rows = {line.split()[0]: re.split("  +", line) for line in text.splitlines()}
    for kind, parts in ((EVALUATION, ["+50.0", "+0.0"]), (INVERSION, ["+0.0", "+50.0"])):
        assert [cell.split()[0] for cell in rows[kind][-2:]] == parts
    assert "with imputed accuracies: selection +12.3," in text
    (line,) = [x for x in table(metrics["before"]).splitlines() if x.startswith(EVALUATION)]
    low, high = (f"{100 * x:.1f}" for x in metrics["before"]["by_type"][EVALUATION]["ci95"])
    assert re.split("  +", line)[-2:] == [f"{low} - {high}", "8"]


def test_openings_stand_before_and_after():
    parts = ("access", "execution", "faultless")
    openings = {
        which: {EVALUATION: {FORWARD: {part: {"mean": mean} for part in parts}}}
        for which, mean in (("before", 0.1), ("after", 0.9))
    }
    line = openings_table({"openings": openings}).splitlines()[1]
    assert re.split("  +", line)[-1].strip() == "10.0 -> 90.0"
