"""Anybody's task from JSON lines: how answers are compared, what is refused, and a whole run."""

import json
import random
import re
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    draw_nothing,
    make_pretrained,
    refusal,
    same_weights,
)

import eval as evaluation
import train_grpo
import train_sft
from data import gsm8k, load_problems, reasoning_gym
from data.jsonl import Task, find_answer, is_taken, number, same_answer
from lib import plots, training
from lib.checkpoint import load_model
from lib.distributed import World
from lib.run_dir import read_log
from lib.tokenizer import load_tokenizer
from lib.transformer import ModelConfig
from strategies import score_response

ONE = World(0, 1, torch.device("cpu"))
needs_math_verify = pytest.mark.skipif(not find_spec("math_verify"), reason="needs math-verify")


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path, rows: list, pattern: str = "", **flags) -> Task:
    config = {"data": str(write_rows(path, rows)), "answer_pattern": pattern, **flags}
    return Task(SimpleNamespace(**config))


# ------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    "answer, found, equal",
    [
        ("yes", "yes", True),
        ("yes", "Yes", False),
        ("1234", "1,234", True),
        ("1,234", "1234.0", True),
        ("0.5", "1/2", True),
        ("1/2", ".5", True),
        ("1/3", "0.3333333333333333", False),
        ("0.1", "0.1000000000000000055511151231257827", False),
        ("-3", "\N{MINUS SIGN}3", True),
        ("+3", " 3. ", True),
        ("3", "-3", False),
        ("3/0", "3/0", True),
        ("3/0", "6/0", False),
        ("0", "3/0", False),
        ("3", "\N{ARABIC-INDIC DIGIT THREE}", False),
        ("5", "five", False),
        ("10", "1e1", False),
    ],
)
def test_answers_are_equal_as_text_or_as_exact_numbers(answer, found, equal):
    assert same_answer(answer, found) is equal


def test_a_pattern_may_find_a_number_in_another_spelling(tmp_path):
    rows = [{"prompt": f"{i} / 2?", "answer": f"{i / 2:g}"} for i in range(40)]
    task = read(tmp_path / "halves.jsonl", rows, r"(\d+\.\d\d)$")
    problem = task.train[0]
    assert problem.is_correct(f"It is {float(problem.answer):.2f}")


def test_a_division_by_zero_is_no_number():
    assert number("3/0") is number("3/000") is number("") is number("-") is number("1/2/3") is None
    assert 2 * number("-1,234.5") == -2469


@pytest.mark.parametrize("unit", ["9", "9,", "0.9", "-9", "9/", "1/9", "9."])
def test_huge_numbers_take_no_time(unit):
    text, clock = unit * 200_000, time.monotonic()
    assert same_answer(text, text)
    assert not same_answer(text, text + "1") and not same_answer("3", text)
    assert not same_answer("9" * 300, text)
    assert time.monotonic() - clock < 2


CODE = "__import__('os').mkdir('trapped')"


@pytest.mark.parametrize("answer", ["3", r"\frac12", "yes"])
def test_no_text_is_run_as_code(answer, tmp_path, monkeypatch):
    if "\\" in answer:
        pytest.importorskip("math_verify")
    monkeypatch.chdir(tmp_path)
    for found in (CODE, f"${CODE}$", rf"\boxed{{{CODE}}}", f"3+{CODE}", f"[{CODE}][0]"):
        assert not same_answer(answer, found) and not same_answer(found, "3")
        number(found)
    assert not Path("trapped").exists()


@needs_math_verify
@pytest.mark.parametrize(
    "answer, found, equal",
    [
        (r"\frac12", "0.5", True),
        (r"$\frac{1}{2}$", "1/2", True),
        (r"\frac12", r"\frac{2}{4}", True),
        (r"\frac12", "0.51", False),
        ("x^2", "x*x", True),
        (r"\{1,2\}", r"\{2,1\}", True),
        (r"\sqrt{2}", "nothing", False),
        (r"\sqrt{2}", "", False),
    ],
)
def test_latex_is_compared_by_math_verify(answer, found, equal):
    assert same_answer(answer, found) is equal


def test_a_response_in_latex_does_not_equal_an_answer_in_plain_text():
    """Only the file's author, not the policy, decides that answers are compared as formulas."""
    assert not same_answer("0.5", r"\frac12") and not same_answer("x", "$x$")


@pytest.mark.parametrize(
    "pattern, text, found",
    [
        (None, " 7 or 8\n", "7 or 8"),
        (r"\d+", "7 or 8", "8"),
        (r"answer (\w+)", "answer one, no: answer two.", "two"),
        (r"(\d+) (apples)", "3 apples", "3"),
        (r"(?:a|b)\d", "a1 b2", "b2"),
        (r"\d+", "none", None),
        (r"####(.*)", "####  12 ", "12"),
        (r"\d*", "7 or 8.", "8"),
    ],
)
def test_the_answer_is_the_first_group_of_the_last_match(pattern, text, found):
    assert find_answer(text, pattern and re.compile(pattern)) == found


def test_a_response_is_right_only_if_it_has_ended(tmp_path):
    rows = [{"prompt": split, "answer": 12, "split": split} for split in ("train", "validation")]
    (problem,) = read(tmp_path / "sums.jsonl", rows, r"= (\d+)").train
    assert problem.answer == "12" and problem.is_correct("= 3, no: = 12.0")
    assert problem.reward("= 12") == 1.0 and problem.reward("= 12", stopped=False) == 0.0
    assert problem.reward("= 12 = 1") == problem.reward("12") == 0.0
    whole, cut = (score_response(problem, "= 12", stopped) for stopped in (True, False))
    assert (whole.correct, whole.error) == (True, None)
    assert (cut.correct, cut.error) == (False, "no answer")
    assert whole.strategy == "none" and whole.matches is None


# ------------------------------------------------------------------------------------------------
# The file


def test_fields_and_their_defaults(tmp_path):
    """An answer may be a number, or that of the response; a numeric difficulty gets a name."""
    rows = [
        {"prompt": "a", "answer": 0.5, "split": "train"},
        {"prompt": "b", "response": "so it is 7", "difficulty": 3, "kind": "sum", "system": "Sum."},
        {"prompt": "c", "answer": "x", "split": "validation", "other": [1]},
    ]
    rows[1]["split"] = "train"
    task = read(tmp_path / "sums.jsonl", rows, r"\d+|x|0\.5")
    a, b = task.train
    assert (a.answer, a.kind, a.difficulty, a.system) == ("0.5", "sums", "", "")
    assert (b.answer, b.kind, b.difficulty, b.system) == ("7", "sum", "difficulty 3", "Sum.")
    assert b.where == f"{tmp_path / 'sums.jsonl'}, line 2" and task.held_out[0].row["other"] == [1]


def test_without_a_split_the_prompts_hash_decides(tmp_path):
    """About one prompt in eight is for validation, in whatever order and beside whatever rows."""
    rows = [{"prompt": f"say {i}", "answer": str(i)} for i in range(800)]
    task = read(tmp_path / "a.jsonl", rows)
    held_out = {problem.prompt() for problem in task.held_out}
    assert 70 < len(held_out) < 130 and len(task.train) + len(held_out) == 800
    random.Random(0).shuffle(rows)
    again = read(tmp_path / "b.jsonl", rows[:600] + rows[:9])
    assert {p.prompt() for p in again.held_out} == held_out & {r["prompt"] for r in rows[:600]}
    drawn = task.validation(50, random.Random(0))
    assert len({p.prompt() for p in drawn}) == 50 and {p.prompt() for p in drawn} <= held_out
    assert len(task.validation(1000, random.Random(0))) == len(held_out)
    assert task.validation(50, random.Random(1)) != drawn, "of the seed"


def test_a_given_split_is_kept(tmp_path):
    rows = [{"prompt": f"{i}", "answer": "1", "split": "train"} for i in range(20)]
    rows += [{"prompt": "other", "answer": "1", "split": "validation"}]
    task = read(tmp_path / "a.jsonl", rows)
    assert len(task.train) == 20 and [p.prompt() for p in task.held_out] == ["other"]


def test_a_validation_prompt_counts_once(tmp_path):
    """Its problem is the first line's; a prompt of training may be there several times."""
    rows = [
        {"prompt": x, "answer": i, "split": s}
        for i, (x, s) in enumerate(
            [("a", "train"), ("a", "train"), ("b", "validation"), ("b", "validation")]
        )
    ]
    task = read(tmp_path / "a.jsonl", rows)
    assert [p.answer for p in task.train] == ["0", "1"]
    assert [p.answer for p in task.held_out] == ["2"]


# ------------------------------------------------------------------------------------------------
# Refusals: one line with file and line number, before any work


GOOD = [
    {"prompt": "one", "answer": "1", "response": "it is 1", "split": "train"},
    {"prompt": "two", "answer": "2", "response": "it is 2", "split": "validation"},
]
PATTERN = r"(\d+)\D*$"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    return make_pretrained(tmp_path_factory.mktemp("model") / "pretrained")


def refused(script, config, capsys) -> str:
    """Return the line with which a script refuses its flags; it must have created nothing."""
    paths = [path for path in Path().rglob("*") if path.name != "__pycache__"]
    before = {path: path.read_bytes() if path.is_file() else b"" for path in paths}
    line = refusal(lambda: script.main(config, ONE), capsys)
    for path in [path for path in Path().rglob("*") if "__pycache__" not in path.parts]:
        assert path in before and (path.is_dir() or path.read_bytes() == before[path]), path
    return line


def grpo_config(pretrained, **flags) -> train_grpo.GrpoConfig:
    given = {"init": str(pretrained), "data": "sums.jsonl", "answer_pattern": PATTERN}
    short = {"updates": 1, "prompts_per_update": 1, "group_size": 2}  # were it not refused
    return train_grpo.GrpoConfig(**(given | short | flags))


def without(key: str) -> dict:
    return {name: value for name, value in GOOD[0].items() if name != key}


@pytest.mark.parametrize(
    "row, says",
    [
        ('{"prompt": ', "line 3: this is no JSON object"),
        ("[1]", "line 3: this is no JSON object"),
        ("9" * 5000, "line 3: this is no JSON object"),
        ("[" * 100_000, "line 3: this is no JSON object"),
        (without("prompt"), "line 3: 'prompt' is missing or empty"),
        (GOOD[0] | {"prompt": "  \n"}, "line 3: 'prompt' is missing or empty"),
        ({"prompt": "x"}, "line 3: 'answer' is missing or empty"),
        (GOOD[0] | {"answer": " "}, "line 3: 'answer' is missing or empty"),
        ({"prompt": "x", "response": "no digit"}, "line 3: 'answer' is missing or empty"),
        (GOOD[0] | {"prompt": 3}, "line 3: 'prompt' is no text"),
        (GOOD[0] | {"answer": ["1"]}, "line 3: 'answer' is no text"),
        (GOOD[0] | {"answer": None}, "line 3: 'answer' is no text"),
        (GOOD[0] | {"response": {}}, "line 3: 'response' is no text"),
        (GOOD[0] | {"system": None}, "line 3: 'system' is no text"),
        (GOOD[0] | {"kind": []}, "line 3: 'kind' is no text"),
        (GOOD[0] | {"split": "test"}, "line 3: 'split' is neither train nor validation"),
        (GOOD[0] | {"split": "validation"}, "line 3: the prompt of line 1, of another split"),
        (GOOD[0] | {"prompt": "x", "answer": "ten"}, "line 3: the answer of 'response' is '1'"),
        (GOOD[0] | {"prompt": "x", "answer": "2"}, "line 3: the answer of 'response' is '1'"),
        (GOOD[0] | {"prompt": "x", "response": "none"}, "line 3: the answer of 'response' is None"),
        (GOOD[0] | {"prompt": "x" * 3000}, "line 3: prompt and response take"),
        (GOOD[0] | {"prompt": "<|im_start|>", "answer": "1" * 280}, "line 3: the answer of 'resp"),
        ({"prompt": "x", "answer": "1" * 280}, "line 3: the answer takes 281 tokens"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(
    row, says, pretrained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    line = row if isinstance(row, str) else json.dumps(row)
    good = "\n".join(map(json.dumps, GOOD))
    Path("sums.jsonl").write_text(f"{good}\n{line}\n\n{json.dumps(GOOD[0])}\n")
    assert f"sums.jsonl, {says}" in refused(train_grpo, grpo_config(pretrained), capsys)


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"answer_pattern": "(1"}, "--answer-pattern '(1': "),
        ({"answer_pattern": r"(\d+)\2"}, "invalid group reference"),
        ({"answer_pattern": r"\\(x)"}, "line 1: the answer of 'response' is None"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": "."}, "directory"),
        ({"init": ""}, "--init"),
        ({"init": "nowhere"}, "nowhere"),
        ({"reward": "f.py"}, "f.py: expected FILE.py:function"),
        ({"reward": "nowhere.py:f"}, "nowhere.py:f: expected FILE.py:function"),
        ({"reward": "f.txt:f"}, "f.txt:f: expected FILE.py:function"),
        ({"reward": "f.py:g"}, "f.py has no function 'g'"),
        ({"tagger": "f.py:constant"}, "no function"),
        ({"reward": "broken.py:f"}, "broken.py:f cannot be loaded: SyntaxError"),
        ({"tagger": "raises.py:f"}, "raises.py:f cannot be loaded: KeyError: 'x'"),
        ({"tagger": "says.py:all"}, "--tagger says 'all', a name of the log's"),
        ({"tagger": "says.py:match"}, "--tagger says 'match', a name of the log's"),
        ({"tagger": "says.py:verified"}, "--tagger says 'verified', a name of the log's"),
        ({"tagger": "says.py:accuracy_at"}, "--tagger says 'accuracy_at', a name of the log's"),
        ({"max_new_tokens": 5000}, "positions"),
    ],
)
def test_bad_flags_are_refused(flags, says, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), GOOD)
    Path("f.py").write_text("constant = 1\ndef f(row, response, correct):\n    return 1\n")
    shutil.copy("f.py", "f.txt")
    Path("broken.py").write_text("def f(:\n")
    Path("raises.py").write_text("{}['x']\n")
    names = ("all", "match", "verified", "accuracy_at")
    Path("says.py").write_text("".join(f"def {x}(*_): return '{x}'\n" for x in names))
    assert says in refused(train_grpo, grpo_config(pretrained, **flags), capsys)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_file_without_problems_of_a_split_is_refused(
    split, pretrained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), [row for row in GOOD if row["split"] != split])
    line = refused(train_grpo, grpo_config(pretrained), capsys)
    assert f"sums.jsonl holds no {split} problem" in line


def test_sft_refuses_rows_without_a_response(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for i in (0, 1):
        rows = [dict(row) for row in GOOD]
        del rows[i]["response"]
        write_rows(Path("sums.jsonl"), rows)
        config = train_sft.SftConfig(data="sums.jsonl", answer_pattern=PATTERN, updates=1)
        assert f"line {i + 1}: SFT needs a 'response'" in refused(train_sft, config, capsys)


def test_latex_without_math_verify_is_refused(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.jsonl.find_spec", lambda name: None)
    write_rows(Path("sums.jsonl"), [*GOOD, {"prompt": "x", "answer": r"\frac12"}])
    line = refused(train_grpo, grpo_config(pretrained, answer_pattern=""), capsys)
    assert "sums.jsonl, line 1: the answer of 'response' is 'it is 1'" in line
    rows = [{k: v for k, v in row.items() if k != "response"} for row in GOOD]
    write_rows(Path("sums.jsonl"), [*rows, {"prompt": "x", "answer": r"\frac12"}])
    line = refused(train_grpo, grpo_config(pretrained, answer_pattern=""), capsys)
    assert "sums.jsonl, line 3: to compare LaTeX, pip install math-verify" in line


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-1e999", "'1'"])
def test_a_reward_that_is_not_finite_ends_the_run(value, tmp_path, capsys):
    """The line names the row that the function was called with."""
    function = tmp_path / "f.py"
    function.write_text(f"def f(row, response, correct):\n    return {value} if response else 0\n")
    task = read(tmp_path / "sums.jsonl", GOOD, PATTERN, reward=f"{function}:f")
    line = refusal(lambda: score_response(task.held_out[0], "2"), capsys)
    assert "sums.jsonl, line 2: --reward returned " in line


def test_a_group_that_takes_no_part_in_the_match_is_no_answer():
    assert not find_answer("b", re.compile("a(x)|b"))


@pytest.mark.parametrize(
    "pattern, response",
    [
        (r"((\d)\d?)\D*$", "a 42."),
        (r"(((?:4|2))2)", "42"),
        (r"\((\d+)\)", "(42)"),
        (r"(?:is|=) ([^()]+)$", "7 is 42"),
        (r"answer (?P<n>\d+)", "answer 42"),
        (r"(?i)ANSWER: (\d+)|(\d+) it is", "answer: 42"),
        (r"(?<=#### )-?\d+", "#### 42"),
        (r"\d+(?= dollars)", "42 dollars"),
        (r"((4|2)\2?2)$", "42"),
        ("(?x) # a number)\n(\\d+)", "42"),
    ],
)
def test_a_pattern_that_finds_the_answer_is_taken(pattern, response, tmp_path):
    rows = [row | {"answer": "42", "response": response} for row in GOOD]
    task = read(tmp_path / "sums.jsonl", rows, pattern)
    assert task.train[0].is_correct(response) and not task.train[0].is_correct("0")


def test_a_pair_is_no_number():
    assert number("1,2") is None and not same_answer("12", "1,2") and number("1,,234") is None


def test_a_lone_surrogate_is_refused_with_its_line(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), [*GOOD, {"prompt": "\ud800", "answer": "3"}])
    assert "line 3" in refused(train_grpo, grpo_config(pretrained), capsys)


# ------------------------------------------------------------------------------------------------
# Prompts


def test_a_system_prompt_ends_up_in_the_chat_template(pretrained, tmp_path):
    rows = [GOOD[0] | {"system": "Answer with a number."}, GOOD[1]]
    task = read(tmp_path / "sums.jsonl", rows, PATTERN)
    tokenizer = load_tokenizer(pretrained)
    prompts = [tokenizer.prompt(problem) for problem in task.train + task.held_out]
    with_system, without_system = tokenizer.decode(prompts)
    assert with_system == (
        "<|im_start|>system\nAnswer with a number.<|im_end|>\n<|im_start|>user\none<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert without_system == "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\n"
    plain = load_tokenizer(pretrained, chat_template=False)
    assert plain.decode([plain.prompt(task.train[0])]) == ["Answer with a number.\n\none"]


def test_a_tokenizer_may_compose_letters(pretrained, tmp_path):
    """Qwen's do: a letter and its accent come back as one character."""
    file = pretrained / "tokenizer.json"
    backend = json.loads(file.read_text())
    file.write_text(json.dumps(backend | {"normalizer": {"type": "NFC"}}))
    rows = [row | {"system": "cafe\N{COMBINING ACUTE ACCENT}, 5 \N{OHM SIGN}"} for row in GOOD]
    task = read(tmp_path / "sums.jsonl", rows, PATTERN)
    for chat in (False, True):
        assert load_tokenizer(pretrained, chat).checked_prompts(task.train)


def test_a_template_that_drops_the_system_prompt_is_refused(
    pretrained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(pretrained, tmp_path / "model")
    (model / "chat_template.jinja").write_text("{{ messages[-1]['content'] }} Assistant:")
    write_rows(Path("sums.jsonl"), [GOOD[0], GOOD[1] | {"system": "Think."}])
    line = refused(train_grpo, grpo_config(model), capsys)
    assert "sums.jsonl, line 2: the model's prompts do not hold the problem" in line


def test_responses_are_as_long_as_the_longest_solution_and_a_line_more(pretrained, tmp_path):
    """Without solutions they may take 256 tokens."""
    tokenizer, path = load_tokenizer(pretrained), tmp_path / "sums.jsonl"
    task = read(path, GOOD, PATTERN)
    assert tokenizer.max_response_tokens(task, 2048) == 2 * len("it is 1")
    bare = [{"prompt": row["prompt"], "answer": "1", "split": row["split"]} for row in GOOD]
    assert tokenizer.max_response_tokens(read(path, bare), 2048) == 256
    assert tokenizer.max_response_tokens(task, 2048, 9) == 9


# ------------------------------------------------------------------------------------------------
# A whole run


FUNCTIONS = """
def reward(row, response, correct):
    return (7.5 if correct else -2.25) + 0.125 * len(response.split()) * len(row["kind"])

def label(row, response):
    return (response.split() or [""])[0]  # "well", "so", or what else the model says
"""
PATTERN_OF_RUN = r"(\d)[^\d]*$"
SMALL = {"prompts_per_update": 4, "group_size": 4, "eval_problems": 8, "precision": "fp32"}
SMALL |= {"updates": 4, "save_every": 2, "eval_every": 2, "lr": 1e-3, "warmup": 0}


def digits() -> list[dict]:
    """Return problems in two kinds and two difficulties, and solutions in two styles."""
    rows = []
    for i in range(10):
        for words in ("", "please", "now", "once more"):
            for kind, answer in (("copy", i), ("next", (i + 1) % 10)):
                rows.append({"prompt": f"{words} {kind} {i} :", "kind": kind, "answer": answer})
                rows[-1]["difficulty"] = "long" if words else "short"
                style = "well {}" if len(rows) % 3 else "so it is {} ."
                rows[-1]["response"] = style.format(answer)
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> SimpleNamespace:
    """SFT of a tiny model on a file, then GRPO with a reward and a tagger, with the plots."""
    folder = tmp_path_factory.mktemp("place")
    data = write_rows(folder / "digits.jsonl", digits())
    (folder / "own.py").write_text(FUNCTIONS)
    task = {"data": str(data), "answer_pattern": PATTERN_OF_RUN}
    functions = {name: f"{folder / 'own.py'}:{name}" for name in ("reward", "label")}
    flags = task | SMALL | {"init": str(folder / "sft"), "out": str(folder / "rl")}
    flags |= {"reward": functions["reward"], "tagger": functions["label"]}
    with pytest.MonkeyPatch.context() as patch:
        smaller = ModelConfig(0, hidden_size=48, intermediate_size=96, num_hidden_layers=2)
        patch.setattr("lib.checkpoint.TINY", smaller)
        sft = {"updates": 60, "batch_size": 16, "warmup": 5, "lr": 1e-2, "precision": "fp32"}
        train_sft.main(train_sft.SftConfig(**task, **sft, out=str(folder / "sft")), ONE)
    figures, real = [], plots.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, path: figures.append(figure))
        train_grpo.main(train_grpo.GrpoConfig(**flags), ONE)
    real(figures[0], folder / "rl" / "evaluation.png")
    rows = read_log(folder / "rl" / "metrics.jsonl")
    return SimpleNamespace(folder=folder, data=data, flags=flags, rows=rows, figures=figures)


def test_sft_learns_the_solutions_of_a_file(place):
    rows = read_log(place.folder / "sft" / "metrics.jsonl")
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["accuracy"] is not None
    assert rows[-1]["validation_loss"] > 0 and rows[-1]["accuracy_given_match"] is None


def test_rewards_and_labels_reach_the_log(place):
    assert len(place.rows) == 4
    for row in place.rows:
        assert {"accuracy/copy", "accuracy/next"} & row.keys()
        assert {"accuracy_at/long", "accuracy_at/short"} & row.keys()
        assert row["well/all"] + row["so/all"] > 0.5 and 0 <= row["so/all"] <= 1
        kinds = [key.removeprefix("accuracy/") for key in row if key.startswith("accuracy/")]
        assert all(row[f"match_rate/{kind}"] is None for kind in kinds)
        assert all(0 <= row[f"well/{kind}"] <= 1 for kind in kinds)
        assert not {"forward/all", "backward/all", "none/all"} & row.keys()
        low, high = -2.25, 7.5 + 0.5 * 20
        assert low <= row["reward"] <= high and row["reward"] not in (0, 1)
    assert any(not 0 <= row["reward"] <= 1 for row in place.rows)
    assert {"validation/copy", "validation/next"} <= place.rows[1].keys()
    assert place.rows[0]["grad_norm"] > 0, "such rewards train"


def test_kept_responses_have_the_functions_rewards_and_labels(place):
    rows = read_log(place.folder / "rl" / "responses.jsonl")
    answers = {row["prompt"]: row for row in digits()}
    for row in rows:
        correct = row["stopped"] and re.search(PATTERN_OF_RUN, row["response"]) is not None
        correct = correct and row["answer"] == re.search(PATTERN_OF_RUN, row["response"])[1]
        words, kind = row["response"].split(), answers[row["prompt"]]["kind"]
        assert row["correct"] == correct and row["kind"] == kind
        assert row["reward"] == (7.5 if correct else -2.25) + 0.125 * len(words) * len(kind)
        assert row["strategy"] == (words[0] if words else "none") and row["matches"] is None
    assert {row["correct"] for row in rows} == {True, False}


def test_rewards_and_labels_reach_evaluation_and_its_table(place, capsys):
    """eval.py needs no --data: the checkpoint says which it was; the split of the gain adds up."""
    metrics = json.loads((place.folder / "rl" / "evaluation.json").read_text())
    for side in ("before", "after"):
        assert set(metrics[side]["by_type"]) == {"copy", "next"}
        assert set(metrics[side]["by_difficulty"]) == {"long", "short"}
        assert {"well", "so"} <= set(metrics[side]["by_strategy"]) and "well_share" in metrics[
            side
        ]["overall"]
        assert metrics[side]["overall"]["match_rate"] is None
    reasons = metrics["reasons"]
    assert set(reasons["by_type"]) == {"copy", "next"}
    for part in (reasons["overall"], *reasons["by_difficulty"].values()):
        gain = part["selection"]["mean"] + part["improvement"]["mean"]
        assert part["gain"]["mean"] == pytest.approx(gain)
    assert reasons["overall"]["gain"]["mean"] == pytest.approx(
        metrics["difference"]["overall"]["pass@1"]
    )

    capsys.readouterr()
    tagger = place.flags["tagger"]
    flags = {"checkpoints": [str(place.folder / name) for name in ("sft", "rl")], "samples": 2}
    flags |= {"json": str(place.folder / "e.json"), "tagger": tagger, "show": 1}
    evaluation.main(evaluation.EvalConfig(**flags), ONE)
    out = capsys.readouterr().out
    head, *table = out.split("\n\n")[1].splitlines()
    assert "validation problems of digits" in out and re.match(r" +pass@1 .*well", head)
    assert [line.split()[0] for line in table[:5]] == ["all", "copy", "next", "long", "short"]
    assert out.count("validation problem 0, ") == 2 and ", answer " in out
    again = json.loads((place.folder / "e.json").read_text())
    assert set(again["before"]["by_strategy"]) >= {"well", "so"}

    evaluation.main(evaluation.EvalConfig(checkpoints=[str(place.folder / "rl")]), ONE)
    head, *table = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert "pass@4" in head and "well" not in head, "--tagger is not remembered"
    assert [line.split()[0] for line in table] == ["all", "copy", "next", "long", "short"]


def test_a_file_that_has_changed_since_training_is_told(place, capsys):
    """Its validation problems may have been trained on; another file is another test."""
    flags = {"checkpoints": [str(place.folder / "rl")], "problems": 1, "samples": 1}
    content = place.data.read_bytes()
    place.data.write_bytes(content + b"\n")
    evaluation.main(evaluation.EvalConfig(**flags), ONE)
    place.data.write_bytes(content)
    assert f"{place.data} has changed: training may have seen" in capsys.readouterr().err
    for data in ("", str(shutil.copy(place.data, place.folder / "same.jsonl"))):
        evaluation.main(evaluation.EvalConfig(**flags, data=data), ONE)
        assert "has changed" not in capsys.readouterr().err


def test_labels_reach_the_plots(place):
    """Bars are labelled by strategy, lines by kind; the PNG can be written."""
    of_evaluation, of_training = place.figures
    texts = {text for axis in of_evaluation.axes for text in axis.get_legend_handles_labels()[1]}
    assert {"copy before", "next after", "well", "so", "selection"} <= texts
    texts = {text for axis in of_training.axes for text in axis.get_legend_handles_labels()[1]}
    assert {"copy", "next"} <= texts
    assert (place.folder / "rl" / "evaluation.png").stat().st_size > 10_000


def test_any_reward_lies_within_its_plot(place):
    (axis,) = [a for a in place.figures[1].axes if a.get_title() == "reward"]
    low, high = axis.get_ylim()
    assert all(low <= row["reward"] <= high for row in place.rows)


def test_resume_is_exact_and_refuses_other_inputs(place, tmp_path, monkeypatch, capsys):
    """Two updates, a stop and two more equal four; not if the data or a function has changed."""
    draw_nothing(monkeypatch)
    run = shutil.copytree(place.folder / "rl", tmp_path / "rl")
    shutil.rmtree(run / "step-4")
    config = train_grpo.GrpoConfig(**(place.flags | {"out": str(run), "resume": True}))
    for flag, file in (("--data", place.data), ("--reward", place.folder / "own.py")):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        line = refusal(lambda: train_grpo.main(config, ONE), capsys)
        assert f"the file of {flag} has changed since {run} was started" in line
        assert not (run / "step-4").exists()
        file.write_bytes(content)

    train_grpo.main(config, ONE)
    steps = [load_model(folder / "step-4")[0] for folder in (run, place.folder / "rl")]
    assert same_weights(*steps)
    for name in ("responses.jsonl", "evaluation.json"):
        a, b = ((folder / name).read_text() for folder in (run, place.folder / "rl"))
        assert a.replace(str(run), "") == b.replace(str(place.folder / "rl"), "")
    rows = read_log(run / "metrics.jsonl")
    timed = {"rollout_tokens_per_second", "training_tokens_per_second", "peak_memory_gb"}
    for a, b in zip(place.rows, rows, strict=True):
        assert {k: x for k, x in a.items() if k not in timed} == {
            k: x for k, x in b.items() if k not in timed
        }


def test_a_changed_pattern_or_file_name_is_refused_on_resume(place, tmp_path, capsys):
    other = shutil.copy(place.data, tmp_path / "copy.jsonl")
    changes = {"--answer-pattern": {"answer_pattern": r"\d"}, "--data": {"data": other}}
    for says, flags in changes.items():
        config = train_grpo.GrpoConfig(**(place.flags | flags | {"resume": True}))
        line = refusal(lambda config=config: train_grpo.main(config, ONE), capsys)
        assert f"was started with {says}" in line


def test_any_number_is_a_reward_and_no_label_moves_the_cursor(tmp_path):
    function = tmp_path / "f.py"
    function.write_text(
        "import numpy\n"
        "def r(row, response, correct):\n    return numpy.float32(0.5)\n"
        "def t(row, response):\n    return 'a\\x1b[2J'\n"
    )
    functions = {"reward": f"{function}:r", "tagger": f"{function}:t"}
    task = read(tmp_path / "sums.jsonl", GOOD, PATTERN, **functions)
    scored = score_response(task.held_out[0], "2")
    assert scored.reward == 0.5 and scored.strategy == "a\N{REPLACEMENT CHARACTER}[2J"


@pytest.mark.parametrize(
    "label, strategy", [(None, "none"), ("", "none"), (0, "0"), (True, "True")]
)
def test_a_tagger_that_says_nothing_gives_no_label(label, strategy, tmp_path):
    function = tmp_path / "f.py"
    function.write_text(f"def t(row, response):\n    return {label!r}\n")
    task = read(tmp_path / "sums.jsonl", GOOD, PATTERN, tagger=f"{function}:t")
    assert score_response(task.held_out[0], "2").strategy == strategy


# ------------------------------------------------------------------------------------------------
# What a reader of the code has found

SUMS = [{"prompt": f"{i} + 1?", "answer": i + 1, "difficulty": 3, "kind": 7} for i in range(40)]


def test_functions_are_given_the_line_as_it_stands_in_the_file(tmp_path):
    """Bug: a number had become a text, so that every reward was 0."""
    (tmp_path / "beside.py").write_text("def same(a, b):\n    return float(a == b)\n")
    code = "import beside\ndef r(row, response, correct):\n"
    code += "    return beside.same(row['answer'], int(response or 0)) + row['kind']\n"
    (tmp_path / "own.py").write_text(code)
    task = read(tmp_path / "sums.jsonl", SUMS, reward=f"{tmp_path / 'own.py'}:r")
    problem = task.train[0]
    assert problem.reward(problem.answer) == 8 and problem.reward("99") == 7
    assert (problem.kind, problem.difficulty) == ("7", "difficulty 3")


def test_json_numbers_are_answers_as_they_are_written(tmp_path):
    """Bug: Python's spellings, 1e-05 and True, which no response has."""
    answers = [0.00001, 1e16, 2.5, 3, True, False] * 8
    rows = [{"prompt": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    task = read(tmp_path / "a.jsonl", rows)
    found = {problem.answer for problem in task.train}
    assert found == {"0.00001", "10000000000000000", "2.5", "3", "true", "false"}


def test_a_label_that_tables_have_does_not_end_a_run(tmp_path):
    (tmp_path / "own.py").write_text("def first(row, response):\n    return response[:3]\n")
    task = read(tmp_path / "sums.jsonl", SUMS, tagger=f"{tmp_path / 'own.py'}:first")
    assert [task.train[0].label(x) for x in ("all of them", "some")] == ["all_", "som"]


@pytest.mark.parametrize("other", ["What is  2+2?", "What is 2+2? ", "What\r\nis 2+2?"])
def test_white_space_makes_no_other_prompt(other, tmp_path):
    """Bug: such a prompt could be of training and of validation, the same to the model."""
    prompts = {"train": "What is 2+2?", "validation": other}
    rows = [{"prompt": x, "answer": "4", "split": split} for split, x in prompts.items()]
    with pytest.raises(ValueError, match="the prompt of line 1, of another split"):
        read(tmp_path / "a.jsonl", rows)
    few = [{"prompt": f"{i} {x}", "answer": "4"} for i in range(40) for x in prompts.values()]
    held_out = read(tmp_path / "b.jsonl", few).held_out
    assert held_out and not {int(p.prompt().split()[0]) for p in held_out} & {
        int(p.prompt().split()[0]) for p in read(tmp_path / "b.jsonl", few).train
    }


@pytest.mark.parametrize(
    "answer, found, equal",
    [("New  York", "New York", True), ("cafe\u0301", "caf\u00e9", True), ("a b", "ab", False)],
)
def test_what_tokenizers_change_does_not_count(answer, found, equal):
    assert same_answer(answer, found) is equal


def test_a_file_named_all_needs_types(tmp_path):
    with pytest.raises(ValueError, match="'all' is the name"):
        read(tmp_path / "all.jsonl", [{"prompt": "a?", "answer": "b"}])


@pytest.mark.parametrize("pattern", [r"is( -?\d+)", r"\s-?\d+\s*$"])
def test_a_pattern_may_begin_with_a_space(pattern, tmp_path):
    task = read(tmp_path / "sums.jsonl", SUMS, pattern)
    assert task.train[0].is_correct(f"It is {task.train[0].answer}")


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"answer_pattern": "a{99999999999}"}, "--answer-pattern"),
        ({"reward": "leaves.py:f"}, "leaves.py:f cannot be loaded: SystemExit"),
    ],
)
def test_more_flags_are_refused_in_a_line(flags, says, pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), GOOD)
    Path("leaves.py").write_text("import sys\nsys.exit()\n")
    assert says in refused(train_grpo, grpo_config(pretrained, **flags), capsys)


@pytest.mark.parametrize("response", ["well<|im_end|> it is 1", "it is 1<|im_end|>"])
def test_a_response_with_a_stop_token_is_refused(
    response, pretrained, tmp_path, monkeypatch, capsys
):
    """Sampling would end there: one before the answer would be learned, and never be right."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), [GOOD[0] | {"response": response}, GOOD[1]])
    assert "sums.jsonl, line 1: 'response' holds a stop" in refused(
        train_grpo, grpo_config(pretrained), capsys
    )


def test_more_examples_than_a_file_holds_are_refused(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path("sums.jsonl"), GOOD)
    line = refused(train_grpo, grpo_config(pretrained, examples=2), capsys)
    assert "sums.jsonl holds 1 training problems: give fewer --examples" in line


def test_a_model_of_ones_own_problems_may_go_on_with_the_papers(pretrained):
    """Bug: GF(11), a default that stands in its training.json, was said to be what it knows."""
    meta = {"stage": "sft", "data": "sums.jsonl", "field": 11, "relabel": "fixed"}
    (pretrained / "training.json").write_text(json.dumps(meta))
    config = train_grpo.GrpoConfig(init=str(pretrained), field=3, steps="1-2", lora=0)
    config = train_grpo.fill_defaults(config, tiny=False)
    config.prompts_per_update, config.lora_dropout = 1, 0.0
    task, problems = load_problems(config, 2)
    tokenizer = load_tokenizer(pretrained, chat_template=True)
    budget = training.validate(config, tokenizer, pretrained, task, problems, ONE)
    (pretrained / "training.json").unlink()
    assert budget > 0


def test_what_a_tokenizer_changes_may_lose_the_answer(tmp_path, monkeypatch, capsys):
    """Words have no line breaks: the pattern finds an answer in the file, and in no response."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} + 1", "response": f"think\nanswer {i + 1}"} for i in range(40)]
    write_rows(Path("lines.jsonl"), rows)
    config = train_sft.SftConfig(data="lines.jsonl", answer_pattern=r"(?m)^answer (\d+)$")
    line = refusal(lambda: train_sft.main(config, ONE), capsys)
    assert "makes 'think answer 1' of 'response'" in line and not Path("ckpt").exists()


def test_sft_needs_positions_for_its_solutions_whatever_it_samples(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} ?", "response": "a " * (3000 * (i == 7)) + "b"} for i in range(40)]
    write_rows(Path("long.jsonl"), rows)
    flags = {"data": "long.jsonl", "answer_pattern": "b", "max_new_tokens": 9}
    line = refusal(lambda: train_sft.main(train_sft.SftConfig(**flags), ONE), capsys)
    assert "of 2048 positions" in line


def test_of_a_file_all_examples_are_drawn(tmp_path):
    file = str(write_rows(tmp_path / "a.jsonl", SUMS))
    for flags, n in (({}, None), ({"examples": 3}, 3)):
        config = train_grpo.GrpoConfig(data=file, **flags)
        task, _ = load_problems(config, 2)
        assert config.examples == (n or len(task.train))


def test_functions_that_fail_are_refused(tmp_path, capsys):
    functions = "def few(row):\n    return 1\ndef exits(*_):\n    raise SystemExit\n"
    (tmp_path / "own.py").write_text(functions)
    about = {"data": str(write_rows(tmp_path / "a.jsonl", SUMS)), "answer_pattern": ""}
    for flag in ("reward", "tagger"):
        for name, error in (("few", "TypeError"), ("exits", "SystemExit")):
            config = SimpleNamespace(**about, **{flag: f"{tmp_path}/own.py:{name}"})
            line = refusal(lambda config=config: Task(config), capsys)
            assert f"--{flag} failed: {error}" in line and "a.jsonl, line " in line


def test_problems_are_drawn_from_their_split_by_number_or_at_random(tmp_path):
    task, stream = read(tmp_path / "a.jsonl", SUMS), random.Random(0)
    for split, problems in (("train", task.train), ("validation", task.held_out)):
        n = len(problems)
        assert [task.sample(stream, split, i) for i in range(2 * n)] == problems * 2
        assert all(task.sample(stream, split) in problems for _ in range(20))


def test_a_prompt_under_another_system_message_is_another(tmp_path):
    same = {"prompt": "2 + 2?", "answer": "4"}
    rows = [same | {"split": x, "system": x} for x in ("train", "validation")]
    task = read(tmp_path / "a.jsonl", rows)
    assert [len(problems) for problems in (task.train, task.held_out)] == [1, 1]


def test_names_of_the_log_are_no_labels():
    names = "all accuracy verified match match_rate validation accuracy_at pass@1 verified@4"
    assert all(map(is_taken, names.split()))


def test_gsm8k(tmp_path, capsys):
    answer = "1 + 1 = 2, no #### yet\nso\n#### 1,234"
    rows = [{"question": "1 + 1?", "answer": answer}, {"question": "x", "answer": "no"}]
    file = write_rows(tmp_path / "g.jsonl", rows)
    assert "g.jsonl, line 2: expected a question" in refusal(lambda: gsm8k.main(file), capsys)
    problem = gsm8k.problem_of(rows[0])
    expected = {"prompt": "1 + 1?", "response": answer, "system": gsm8k.SYSTEM}
    assert problem == expected | {"answer": "1,234", "difficulty": 2}
    rows = [problem | {"prompt": f"{i}?"} for i in range(40)]
    assert read(tmp_path / "p.jsonl", rows, r"#### (\S+)").train[0].is_correct("so #### 1234")


def test_forms_of_an_answer():
    forms = {"7": "number", " -12.\n": "number", "7 apples": "words", "": "words"}
    assert {text: reasoning_gym.form({}, text) for text in forms} == forms


def test_reasoning_gym(capsys):
    pytest.importorskip("reasoning_gym")
    words = ["chain_sum", "max_terms=2", "max_digits=2"]
    reasoning_gym.main(reasoning_gym.GymConfig(words, n=3, seed=7))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 3 and all({"prompt", "answer"} <= row.keys() for row in rows)
    nothing = reasoning_gym.GymConfig(["nothing"])
    assert "reasoning_gym nothing" in refusal(lambda: reasoning_gym.main(nothing), capsys)
