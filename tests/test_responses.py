"""What is kept of responses, how a terminal shows them, and foreign ones: prompts read back."""

import json
import os
import random
import shutil
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    draw_nothing,
    make_pretrained,
    refusal,
    word_tokenizer,
)

import strategies
import train_grpo
import train_sft
from data.finite_field import (
    BACKWARD,
    EVALUATION,
    FORWARD,
    Part,
    Problem,
    Task,
    make_field,
    vocabulary,
)
from data.parse import parse_prompt
from lib import training
from lib.distributed import World
from lib.responses import RESPONSES, Response, ShowConfig
from lib.rng import rng
from lib.run_dir import read_log
from lib.tokenizer import load_tokenizer
from lib.transformer import ModelConfig
from strategies import score_response

ONE = World(0, 1, torch.device("cpu"))
TASKS = {
    "evaluation": Task((2, 5), evaluation_share=1.0),
    "inversion": Task((1, 9), evaluation_share=0.0),
    "composition": Task((1, 3), parts=(2, 5)),
    "shown": Task((2, 5), relabel="shown"),
    "gf13": Task((2, 5), p=13),
    "shown gf13": Task((1, 2), p=13, parts=(1, 3), relabel="shown"),
}


def problems(task: Task, n: int = 200) -> list[Problem]:
    stream = random.Random(0)
    return [task.sample(stream, "train") for _ in range(n)]


# ------------------------------------------------------------------------------------------------
# Prompts read back


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_prompt_gives_back_its_problem(task):
    """From the plain prompt, and from what the tiny model's tokenizer makes of it."""
    tokenizer = word_tokenizer(task.p)
    of_task = problems(task)
    decoded = tokenizer.decode([tokenizer.prompt(problem) for problem in of_task])
    for problem, words in zip(of_task, decoded):
        assert parse_prompt(problem.prompt(), task.p) == problem
        assert parse_prompt(words, task.p) == problem


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """The tokenizer of a pretrained model, with a chat template."""
    return load_tokenizer(make_pretrained(tmp_path_factory.mktemp("model") / "pretrained"))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_prompt_in_a_chat_template_names_its_field(task, chat):
    """The explanation says which field it is, whatever the caller supposes."""
    for problem in problems(task, 20):
        (text,) = chat.decode([chat.prompt(problem)])
        assert "assistant" in text and "elements of GF" in text
        assert parse_prompt(text, 7) == problem


def test_the_last_problem_counts():
    first, last = problems(TASKS["evaluation"], 2)
    shots = f"{first.prompt()}{first.solution(FORWARD)}\n\n{last.prompt()}"
    assert parse_prompt(shots) == last
    assert parse_prompt(f"Solve this.\n\n{first.prompt()}\nThink step by step.") == first
    named = f"The elements of GF(3), or the elements of GF(11): {last.prompt()}"
    assert parse_prompt(named, 13) == last, "the field is the one named last"
    assert parse_prompt(f"{last.prompt()} Not elements of GF(3).") == last, "before the problem"


GOOD = "start e3 5: * e4 6: + e1 end ? solution:"


@pytest.mark.parametrize(
    "old, new",
    [
        (GOOD, ""),
        ("solution:", ""),
        ("solution:", "solution"),
        ("end ?", "end e2"),
        ("end ?", ""),
        ("start e3", "start ?"),
        ("start e3", "start carry"),
        ("start e3", "start e11"),
        ("start e3", "start e03"),
        ("start e3", "start e٣"),
        ("start e3", "restart e3"),
        ("e4", "e9999"),
        ("e4", "x4"),
        ("6:", "7:"),
        ("6:", "5:"),
        ("5: * e4 6: + e1", ""),
        ("+", "-"),
        ("*", "/"),
        ("5: * e4", f"5: * e{make_field(11).names[0]}"),
        (GOOD, f"elements e1 e2 {GOOD}"),
        (GOOD, f"elements e1 e2 e0 e0 {GOOD}"),
        (GOOD, f"elements e0 e1 e2 e3 {GOOD}"),
        ("start e3", "elements of GF(12) start e3"),
        ("start e3", "elements of GF(3) start e3"),
    ],
)
def test_what_is_no_prompt_of_ours_is_refused(old, new):
    assert parse_prompt(GOOD).steps == 2 and old in GOOD
    with pytest.raises(ValueError, match=r"\w"):
        parse_prompt(GOOD.replace(old, new))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_spoiled_prompt_is_refused_or_read_as_it_stands(task):
    """A problem that is read from any text has a prompt that the text holds."""
    stream, words, read = random.Random(1), vocabulary(task.p), 0
    words += ["e99", "e٣", "0:", "9999:", "elements of GF(7)", "elements of GF(9)", "é", ""]
    for problem in problems(task):
        spoiled = problem.prompt().split()
        for _ in range(stream.choice((1, 1, 2, 5))):
            i, j = stream.randrange(len(spoiled)), stream.randrange(len(spoiled))
            change = stream.randrange(4)
            if change == 0:
                del spoiled[i]
            elif change == 1:
                spoiled[i], spoiled[j] = spoiled[j], spoiled[i]
            elif change == 2:
                spoiled.insert(i, spoiled[j])
            else:
                spoiled[i] = stream.choice(words)
        text = " ".join(" ".join(spoiled).split())
        try:
            found = parse_prompt(text, task.p)
        except ValueError as error:
            assert str(error)
            continue
        read += 1
        assert " ".join(found.prompt().split()) in text
        assert found.is_correct(found.solution(FORWARD))
    assert read > 3, "some changes give another problem"


def test_no_text_takes_long_to_refuse():
    for unit in ("start e1 1: + e2 ", "1: + e2 ", "elements e1 ", "e1 ", "end ? ", "GF(7 "):
        with pytest.raises(ValueError, match="no problem"):
            parse_prompt(f"elements e1 start e1 {unit * 20_000}")


# ------------------------------------------------------------------------------------------------
# Responses from elsewhere


def example() -> Problem:
    """Return the chain 1 + 1 = 2, * 2 = 4, + 3 = 7 in GF(11)."""
    return Problem(make_field(11), (Part(EVALUATION, 1, (("+", 1), ("*", 2), ("+", 3)), 7),), 7)


def show(capsys, *place, **flags) -> str:
    """Run strategies.py in this process; return what it prints."""
    capsys.readouterr()
    strategies.main(ShowConfig(place=list(map(str, place)), **flags))
    return capsys.readouterr().out


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def with_wrong_step(problem: Problem) -> tuple[list[str], str]:
    """Return a forward solution whose second step and answer are wrong, and what was due there."""
    lines, zero = problem.solution(FORWARD).split("\n"), problem.field.name(0)
    due, lines[-1] = lines[2], f"answer {zero}"
    lines[2] = due.removesuffix(due.split()[-1]) + zero
    return lines, due


def test_foreign_responses_are_tagged(tmp_path, capsys):
    """--json prints a row for each, with what the tagger says and all that the file says."""
    problem = example()
    lines, due = with_wrong_step(problem)
    inversion = problems(TASKS["inversion"], 1)[0]
    rows = [
        {"prompt": problem.prompt(), "response": problem.solution(FORWARD), "model": "theirs"},
        {"prompt": f"User: {problem.prompt()}Assistant:", "response": "\n".join(lines)},
        {"prompt": inversion.prompt(), "response": inversion.solution(FORWARD)},
        {"prompt": inversion.prompt(), "response": "I cannot say."},
    ]
    file = write_rows(tmp_path / "theirs.jsonl", *rows)
    found = [json.loads(line) for line in show(capsys, file, json=True).splitlines()]
    assert [row["strategy"] for row in found] == [FORWARD, FORWARD, FORWARD, "none"]
    assert [row["matches"] for row in found] == [True, True, False, False]
    assert [row["correct"] for row in found] == [True, False, True, False]
    assert [row["error"] for row in found] == [None, "arithmetic", None, "format"]
    assert [row["error_line"] for row in found] == [None, 2, None, 0]
    assert found[1]["due"] == due and found[3]["due"].startswith("end e")
    assert [row["guess"] for row in found] == [False, False, True, False]
    assert found[0]["model"] == "theirs"
    assert found[1]["prompt"] == rows[1]["prompt"] and found[0]["answer"] == problem.answer
    again = write_rows(tmp_path / "again.jsonl", *found)
    assert [json.loads(x) for x in show(capsys, again, json=True).splitlines()] == found


def test_the_field_is_a_flag_where_no_prompt_names_it(tmp_path, capsys):
    (problem,) = problems(TASKS["gf13"], 1)
    row = {"prompt": problem.prompt(), "response": problem.solution(BACKWARD)}
    file = write_rows(tmp_path / "theirs.jsonl", row)
    (line,) = show(capsys, file, json=True, field=13).splitlines()
    assert json.loads(line)["strategy"] == BACKWARD and json.loads(line)["correct"]


@pytest.mark.parametrize(
    "line, says",
    [
        ("{", "line 3: this is no JSON object"),
        ("3", "line 3: this is no JSON object"),
        ('{"prompt": "x"}', "line 3: prompt or response is missing, or is no text"),
        ('{"response": "x"}', "line 3: prompt or response is missing, or is no text"),
        ('{"prompt": "x", "response": null}', "line 3: prompt or response is missing"),
        ('{"prompt": 3, "response": "x"}', "line 3: prompt or response is missing"),
        ('{"prompt": "x", "response": "x"}', "line 3: the prompt holds no problem"),
        (json.dumps({"prompt": GOOD.replace("e3", "e30"), "response": ""}), "line 3: the problem "),
        (json.dumps({"prompt": "GF(12) elements of GF(12) " + GOOD, "response": ""}), "12 is not"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line, says, tmp_path, capsys):
    good = {"prompt": GOOD, "response": ""}
    file = write_rows(tmp_path / "theirs.jsonl", good, good)
    file.write_text(file.read_text() + line + "\n" + json.dumps(good))
    said = refusal(lambda: show(capsys, file), capsys)
    assert f"{file}, line 3: " in said and says in said


@pytest.mark.parametrize("places", [[], ["a", "b"], ["nowhere"], ["."]])
def test_a_place_without_responses_is_refused(places, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert refusal(lambda: show(capsys, *places), capsys)


def test_a_run_of_sft_is_told_that_it_keeps_no_responses(tmp_path, capsys):
    assert "only GRPO runs keep them" in refusal(lambda: show(capsys, tmp_path), capsys)


@pytest.mark.parametrize(
    "fields",
    [
        {"error_line": 1},
        {"reward": None},
        {"strategy": None},
        {"matches": []},
        {"error_line": None, "correct": True},
    ],
)
def test_fields_of_other_programs_do_no_harm(fields, tmp_path, capsys):
    """They are refused in one line, or kept beside what the tagger says."""
    row = {"prompt": GOOD, "response": "start e3"} | fields
    file = write_rows(tmp_path / "theirs.jsonl", row)
    try:
        assert "none (does not match), wrong" in show(capsys, file)
    except SystemExit:
        assert f"{file}, line 1" in capsys.readouterr().err


@pytest.mark.parametrize("name, value", [("error_line", "x"), ("reward", None), ("stopped", [])])
def test_a_row_of_ours_that_is_spoilt_is_tagged_anew(name, value, tmp_path, capsys):
    row = {"prompt": GOOD, "response": "start e3", "advantage": [0.1]}
    file = write_rows(tmp_path / "theirs.jsonl", row)
    (tagged,) = map(json.loads, show(capsys, file, json=True).splitlines())
    write_rows(file, tagged | {name: value})
    assert json.loads(show(capsys, file, json=True)) == tagged
    assert "none (does not match), wrong\n" in show(capsys, file), "with that advantage, too"
    write_rows(file, tagged | {"response": 5})
    assert "line 1: prompt or response is missing" in refusal(lambda: show(capsys, file), capsys)


def test_a_negative_number_of_responses_is_refused(tmp_path, capsys):
    file = write_rows(tmp_path / "theirs.jsonl", {"prompt": GOOD, "response": ""})
    assert "--n" in refusal(lambda: show(capsys, file, n=-1), capsys)


# ------------------------------------------------------------------------------------------------
# The viewer


def test_lines_are_marked(tmp_path, capsys):
    """+ before right lines, x before the first error, and what was due; . before what follows."""
    problem = example()
    lines, due = with_wrong_step(problem)
    row = {"prompt": problem.prompt(), "response": "\n".join(lines)}
    out = show(capsys, write_rows(tmp_path / "theirs.jsonl", row)).splitlines()
    head = out.index("forward (matches), wrong")
    assert out[0] == f"evaluation, 3 steps, answer {problem.answer}"
    assert out[1] == " | ".join(problem.prompt().split("\n")[:-1])
    assert out[head + 1 :] == [
        *(f"+ {line}" for line in lines[:2]),
        f"x {lines[2]}",
        f"    arithmetic; due: {due}",
        *(f". {line}" for line in lines[3:]),
        "",
    ]


def test_a_response_that_ends_too_early_or_too_late(tmp_path, capsys):
    problem = example()
    lines = problem.solution(FORWARD).split("\n")
    rows = [{"prompt": problem.prompt(), "response": "\n".join(lines[:3])}]
    rows += [{"prompt": problem.prompt(), "response": "\n".join([*lines, "so there"])}]
    out = show(capsys, write_rows(tmp_path / "theirs.jsonl", *rows))
    assert f"+ {lines[2]}\n    no answer; due: {lines[3]}\n" in out
    assert f"+ {lines[-1]}\nx so there\n    format; nothing more was due\n" in out


def test_other_tasks_lines_have_no_marks(tmp_path, capsys):
    """A run on anybody's file shows labels and rewards, and the response's own line breaks."""
    response = Response("first\n\nsecond 7", "sum", "", True, False, 7.25, "by hand")
    row = {"update": 3, "split": "train", "problem": 1, "prompt": "3 + 4", "answer": "7"}
    row |= asdict(response) | {"advantage": -0.5}
    out = show(capsys, write_rows(tmp_path / "rows.jsonl", row)).splitlines()
    assert out[:2] == ["update 3: train problem 1, sum, answer 7", "3 + 4"]
    assert out[3] == "by hand, right, reward 7.25, advantage -0.50, cut off"
    assert [line.strip() for line in out[4:]] == ["first", "", "second 7", ""]


ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\r\b\x00\u202e\u200b\ud800"


def row_of_wild_text(text: str) -> dict:
    row = {"prompt": f"{text} {GOOD}", "response": f"start e3\n{text}\nanswer e3 {text}"}
    return row | {"kind": f"kind {text}", "difficulty": text, "answer": text, "strategy": text}


def test_escape_sequences_do_not_reach_the_terminal(tmp_path, capsys):
    file = write_rows(tmp_path / "theirs.jsonl", row_of_wild_text(ESCAPES))
    out = show(capsys, file)
    assert all(c.isprintable() or c == "\n" for c in out) and "\N{REPLACEMENT CHARACTER}" in out
    out = show(capsys, file, json=True)
    assert out.isascii() and out.replace("\n", "").isprintable() and json.loads(out)


def test_nor_do_those_of_a_line_that_was_due(tmp_path, capsys):
    row = asdict(Response("x", "sum", "", False, True, error_line=0)) | {"response": "x"}
    row |= {"line_error": ESCAPES, "due": ESCAPES, "prompt": "x", "answer": "x"}
    out = show(capsys, write_rows(tmp_path / "rows.jsonl", row))
    assert all(c.isprintable() or c == "\n" for c in out)


@pytest.mark.parametrize("text", ["word " * 60, "x" * 300, "start e3 " * 40])
def test_no_line_is_longer_than_80_columns(text, tmp_path, capsys):
    rows = [row_of_wild_text(text) | {"kind": "sum", "answer": "e3", "difficulty": ""}]
    rows += [{"prompt": GOOD, "response": text}]
    out = show(capsys, write_rows(tmp_path / "theirs.jsonl", *rows))
    assert max(map(len, out.splitlines())) == 80 or " " not in out
    assert max(map(len, out.splitlines())) <= 80


def test_nor_is_a_heading(tmp_path, capsys):
    row = {"prompt": GOOD, "response": "", "answer": "a long answer " * 9}
    out = show(capsys, write_rows(tmp_path / "theirs.jsonl", row))
    assert max(map(len, out.splitlines())) <= 80


def test_colours_are_for_terminals_only(tmp_path, monkeypatch, capsys):
    problem = example()
    lines, _ = with_wrong_step(problem)
    row = {"prompt": problem.prompt(), "response": "\n".join(lines)}
    file = write_rows(tmp_path / "theirs.jsonl", row)
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = show(capsys, file)
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = show(capsys, file)
    assert f"\x1b[32m+ {lines[0]}\x1b[0m" in coloured and f"\x1b[31mx {lines[2]}\x1b[0m" in coloured
    for code in (32, 31, 2, 1, 0):
        coloured = coloured.replace(f"\x1b[{code}m", "")
    assert coloured == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert show(capsys, file) == plain


# ------------------------------------------------------------------------------------------------
# A run's responses


SMALL = {"field": 3, "steps": "1-2", "prompts_per_update": 4, "group_size": 4, "eval_problems": 6}
SMALL |= {"precision": "fp32", "updates": 4, "save_every": 2, "eval_every": 3, "refills": 1}
SMALL |= {"warmup": 0, "lr": 1e-3, "advantage": "mean"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> SimpleNamespace:
    """GRPO of a tiny model, saved after 2 and 4 updates and evaluated after 3, and what trained."""
    folder, trained = tmp_path_factory.mktemp("run"), []
    real = train_grpo.grpo_backward

    def grpo_backward(run, rollout, *args):
        texts = run.tokenizer.decode(rollout.response_tokens())
        trained.append((rollout.problems, texts, rollout.advantages.clone()))
        return real(run, rollout, *args)

    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        smaller = ModelConfig(0, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
        patch.setattr("lib.checkpoint.TINY", smaller)
        sft = {"updates": 60, "batch_size": 16, "warmup": 5, "lr": 1e-2, "precision": "fp32"}
        sft |= {"field": 3, "steps": "1-2", "out": str(folder / "sft")}
        train_sft.main(train_sft.SftConfig(**sft), ONE)
        flags = SMALL | {"init": str(folder / "sft"), "out": str(folder / "rl")}
        patch.setattr(train_grpo, "grpo_backward", grpo_backward)
        train_grpo.main(train_grpo.GrpoConfig(**flags), ONE)
    file = folder / "rl" / "responses.jsonl"
    return SimpleNamespace(
        folder=folder / "rl", flags=flags, trained=trained, file=file, rows=read_log(file)
    )


def test_the_start_and_each_save_and_evaluation_keep_whole_groups(run):
    """Of validation always the same two problems, of training the update's first two."""
    kept = [(row["update"], row["split"], row["problem"]) for row in run.rows]
    validation = [(u, "validation", i) for u in (0, 2, 3, 4) for i in (0, 1) for _ in range(4)]
    train = [(u, "train", i) for u in (2, 3, 4) for i in (0, 1) for _ in range(4)]
    assert sorted(kept) == sorted(validation + train)
    assert [key[0] for key in kept] == sorted(key[0] for key in kept)
    task = Task((1, 2), p=3)
    held_out = [p.prompt() for p in task.validation(6, rng(0, "validation problems"))]
    for row in run.rows:
        if row["split"] == "validation":
            assert row["prompt"] == held_out[row["problem"]] and row["advantage"] is None
    assert len({row["response"] for row in run.rows}) > 8, "they are sampled"


def test_advantages_are_those_that_trained(run):
    """With --refills a group may have been replaced: text and advantage go together."""
    assert len(run.trained) == 4
    for row_number, row in enumerate(run.rows):
        if row["split"] == "train":
            problems, texts, advantages = run.trained[row["update"] - 1]
            i, j = row["problem"], row_number % 4
            assert row["prompt"] == problems[i].prompt() and row["response"] == texts[4 * i + j]
            assert row["advantage"] == advantages[i, j].item()
    assert {row["advantage"] > 0 for row in run.rows if row["advantage"]} == {True, False}


def test_tags_are_those_of_the_text(run):
    for row in run.rows:
        problem = parse_prompt(row["prompt"], 3)
        scored = asdict(score_response(problem, row["response"], row["stopped"]))
        assert scored == {key: row[key] for key in scored}
        assert row["answer"] == problem.answer and row["reward"] == float(row["correct"])
    assert {row["correct"] for row in run.rows} == {True, False}


@pytest.fixture
def resumed(run, tmp_path, monkeypatch):
    """Resume a run from its second update, once its files have been changed; return its folder."""
    draw_nothing(monkeypatch)

    def resume(change=lambda folder: None) -> Path:
        folder = shutil.copytree(run.folder, tmp_path / "rl")
        shutil.rmtree(folder / "step-4")
        change(folder)
        flags = run.flags | {"out": str(folder), "resume": True}
        train_grpo.main(train_grpo.GrpoConfig(**flags), ONE)
        return folder

    return resume


def rewards(folder: Path) -> list[float]:
    return [row["reward"] for row in read_log(folder / "metrics.jsonl")]


def lines_up_to(file: Path, update: int) -> list[str]:
    lines = file.read_text().splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["update"] <= update]


@pytest.mark.parametrize("left", ["all rows", "half a line", "some rows and half a line"])
def test_a_resumed_run_has_the_same_responses(left, run, resumed):
    """Whatever a killed run had written of later updates, the file is identical byte by byte."""

    def change(folder: Path) -> None:
        lines, file = run.file.read_text().splitlines(keepends=True), folder / run.file.name
        n = len(lines_up_to(run.file, 2)) + 3 * (left == "some rows and half a line")
        if left != "all rows":
            file.write_text("".join(lines[:n]) + lines[n][: len(lines[n]) // 2])

    folder = resumed(change)
    assert (folder / run.file.name).read_bytes() == run.file.read_bytes()
    assert rewards(folder) == rewards(run.folder)


def test_a_run_that_was_stopped_by_a_signal_has_them_too(run, tmp_path, monkeypatch):
    """It saves after its first update, when no responses are due."""
    draw_nothing(monkeypatch)
    flags, real = run.flags | {"out": str(tmp_path / "rl")}, training.log_update

    def log_update(*args) -> None:
        real(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(training, "log_update", log_update)
        try:
            train_grpo.main(train_grpo.GrpoConfig(**flags), ONE)
        except SystemExit as stop:  # pytest.raises would keep the run, and so its lock
            assert stop.code == 128 + signal.SIGTERM
    assert [folder.name for folder in (tmp_path / "rl").glob("step-*")] == ["step-1"]
    file = tmp_path / "rl" / run.file.name
    assert file.read_text() == "".join(lines_up_to(run.file, 0))
    train_grpo.main(train_grpo.GrpoConfig(**(flags | {"resume": True})), ONE)
    assert file.read_bytes() == run.file.read_bytes()


def test_another_number_of_kept_responses_is_refused_on_resume(run, resumed, monkeypatch, capsys):
    monkeypatch.setitem(run.flags, "keep_responses", 3)
    assert "--keep-responses 2, not 3" in refusal(resumed, capsys)


def test_none_are_kept_with_0(run, tmp_path, monkeypatch, capsys):
    """The viewer then says so in one line; training is the same."""
    draw_nothing(monkeypatch)
    flags = run.flags | {"out": str(tmp_path / "rl"), "keep_responses": 0}
    train_grpo.main(train_grpo.GrpoConfig(**flags), ONE)
    file = tmp_path / "rl" / run.file.name
    assert not file.exists() or file.read_bytes() == b""
    assert "holds no such response" in refusal(lambda: show(capsys, tmp_path / "rl"), capsys)
    assert rewards(tmp_path / "rl") == rewards(run.folder)


def headings(out: str) -> list[str]:
    return [line.split(",")[0] for line in out.splitlines() if line.startswith("update ")]


def test_the_viewer_selects_by_flags(run, capsys):
    """The newest update by default; with --problem all updates of a validation problem."""
    both = [f"update 4: {split} problem {i}" for split in ("validation", "train") for i in (0, 1)]
    assert headings(show(capsys, run.folder)) == both
    of_first = [f"update 0: validation problem {i}" for i in (0, 1)]
    assert headings(show(capsys, run.folder, update=0)) == of_first
    course = [f"update {u}: validation problem 1" for u in (0, 2, 3, 4)]
    assert headings(show(capsys, run.file, problem=1)) == course
    assert headings(show(capsys, run.folder, problem=1, update=3)) == course[2:3]

    def rows(**flags) -> list[dict]:
        lines = show(capsys, run.folder, json=True, **flags).splitlines()
        return [json.loads(line) for line in lines]

    newest = [row for row in run.rows if row["update"] == 4]
    assert rows() == newest
    for strategy in {row["strategy"] for row in newest}:
        assert rows(strategy=strategy) == [row for row in newest if row["strategy"] == strategy]
    assert rows(wrong=True, update=0) == [
        row for row in run.rows if row["update"] == 0 and not row["correct"]
    ]


@pytest.mark.parametrize("n, shown", [(1, 1), (2, 2), (3, 3), (0, 4), (9, 4)])
def test_so_many_responses_to_each_prompt_are_shown(n, shown, run, capsys):
    out = show(capsys, run.folder, n=n, update=0)
    assert out.count(", reward ") == 2 * shown
    assert [out.count(line) for line in headings(out)] == [1, 1]


def test_a_prompt_is_shown_once_for_groups_that_follow_one_another(run, capsys):
    out = show(capsys, run.folder, problem=0)
    assert out.count("solution:") == 1 and len(headings(out)) == 4


@pytest.mark.parametrize(
    "flags", [{"update": 1}, {"problem": 2}, {"strategy": "sideways"}, {"update": 9, "wrong": True}]
)
def test_an_empty_selection_is_one_line(flags, run, capsys):
    line = refusal(lambda: show(capsys, run.folder, **flags), capsys)
    assert f"{run.folder} holds no such response" in line


def test_all_rows_have_the_same_keys(run):
    """Those of a scored response, its text under the name that the viewer reads."""
    (keys,) = {tuple(row) for row in run.rows}
    fields = {*asdict(Response("", "", "", True, True))} - {"text"}
    where = {"update", "split", "problem", "prompt", "answer", "response", "advantage"}
    assert {*keys} == fields | where


def test_a_response_that_an_engine_cut_off_is_not_right(tmp_path, capsys):
    problem = example()
    row = {"prompt": problem.prompt(), "response": problem.solution(FORWARD)}
    for reason, says in (("length", "cut off"), ("stop", "right")):
        file = write_rows(tmp_path / f"{reason}.jsonl", row | {"finish_reason": reason})
        assert says in show(capsys, file)


def test_a_row_of_another_version_is_not_judged_anew(tmp_path, capsys):
    """Bug: in GF(11), whatever the run's field."""
    row = {"prompt": GOOD, "response": "start e3", "strategy": "forward", "correct": True}
    file = write_rows(tmp_path / RESPONSES, row)
    (tmp_path / "metrics.jsonl").touch()
    line = refusal(lambda: show(capsys, file), capsys)
    assert "line 1: another version of these scripts wrote this row" in line


def test_a_file_of_that_name_is_read_to_its_end(tmp_path, capsys):
    """Only a run, which may be writing, has an unfinished last line."""
    row = {"prompt": GOOD, "response": "start e3"}
    file = write_rows(tmp_path / RESPONSES, row, row)
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    assert len(show(capsys, file, json=True).splitlines()) == 2
    (tmp_path / "metrics.jsonl").touch()
    assert len(show(capsys, file, json=True).splitlines()) == 1
