"""The whole pipeline in miniature: SFT, GRPO and evaluation; resume; two processes."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from conftest import refusal, same_weights
from safetensors.torch import load_file, save_file

import train_grpo
import train_sft
from data.finite_field import Problem
from data.parse import parse_prompt
from lib import training
from lib.checkpoint import find_checkpoint, load_model
from lib.distributed import World
from lib.run_dir import read_log
from lib.transformer import ModelConfig
from paper import tour
from rollout import Rollout

ONE = World(0, 1, torch.device("cpu"))
HERE = Path(train_grpo.__file__).parent
pytestmark = pytest.mark.usefixtures("undrawn")
SMALL = {
    "field": 3,
    "steps": "1-2",
    "prompts_per_update": 4,
    "group_size": 4,
    "eval_problems": 8,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def sft(tmp_path_factory) -> Path:
    """A model that solves chains of one or two steps, in either strategy, part of the time."""
    out = tmp_path_factory.mktemp("sft")
    flags = {
        "field": 3,
        "steps": "1-2",
        "updates": 160,
        "warmup": 10,
        "lr": 6e-3,
        "position_gap": 0,
        "batch_size": 24,
        "precision": "fp32",
    }
    with pytest.MonkeyPatch.context() as patch:
        smaller = ModelConfig(0, hidden_size=96, intermediate_size=288, num_hidden_layers=2)
        patch.setattr("lib.checkpoint.TINY", smaller)
        train_sft.main(train_sft.SftConfig(out=str(out / "run"), **flags), ONE)
    return out / "run"


def grpo(out: Path, init: Path, **flags) -> list[dict]:
    train_grpo.main(train_grpo.GrpoConfig(init=str(init), out=str(out), **(SMALL | flags)), ONE)
    return read_log(out / "metrics.jsonl")


def test_sft_learns(sft):
    rows = read_log(sft / "metrics.jsonl")
    assert fmean(r["loss"] for r in rows[-20:]) < 0.3 * fmean(r["loss"] for r in rows[:20])
    assert rows[-1]["accuracy_given_match"] > 0.5
    assert find_checkpoint(str(sft)).name == "step-160"


@pytest.mark.usefixtures("two_threads")
def test_grpo_improves_and_reports(sft, tmp_path, capsys, monkeypatch):
    """Reward rises because the matching strategy is taken more often; all files are written."""
    monkeypatch.undo()  # this test needs the plots
    flags = {"updates": 30, "prompts_per_update": 16, "group_size": 8, "lr": 3e-4}
    rows = grpo(tmp_path / "run", sft, eval_problems=64, **flags)
    first, last = rows[:5], rows[-5:]

    def mean(some, key):
        return fmean(row[key] for row in some)

    assert mean(last, "reward") > mean(first, "reward") + 0.15
    chosen = ("forward/evaluation", "backward/inversion", "match_rate/evaluation")
    assert all(mean(last, key) > mean(first, key) + 0.1 for key in chosen)
    assert max(row["logp_diff_max"] for row in rows) < 1e-4

    expected = {
        "reward",
        "accuracy/evaluation",
        "forward/inversion",
        "frac_reward_zero_std",
        "entropy",
        "ratio",
    }
    expected |= {"clip_ratio", "grad_norm", "response_length", "frac_truncated", "logp_diff_max"}
    expected |= {"rollout_tokens_per_second", "training_tokens_per_second", "peak_memory_gb"}
    assert all(row[name] is not None for row in rows for name in expected)

    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    before, after = (metrics[side]["overall"]["match_rate"] for side in ("before", "after"))
    assert after > before + 0.2  # pass@1 of these few problems is known to 20 points only
    for plot in ("evaluation.png", "training.png"):
        assert (tmp_path / "run" / plot).stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "before" in out and "after" in out and str(tmp_path / "run" / "step-30") in out


def test_resume_is_exact(sft, tmp_path):
    """Four updates equal two, a stop and two more; the KL term needs the reference again."""
    flags = {"updates": 4, "beta": 0.05, "save_every": 2, "eval_every": 2}
    whole = grpo(tmp_path / "whole", sft, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-4")
    parts = grpo(tmp_path / "parts", sft, resume=True, **flags)
    assert same_weights(*(load_model(tmp_path / name / "step-4")[0] for name in ("whole", "parts")))
    for a, b in zip(whole, parts, strict=True):
        assert (a["update"], a["reward"], a["loss"]) == (b["update"], b["reward"], b["loss"])
    assert (
        all(row["kl"] >= 0 for row in parts)
        and parts[-1]["kl"] > 0
        and "validation/evaluation" in parts[-1]
    )


def test_a_resumed_run_computes_as_it_began(sft, tmp_path, monkeypatch):
    """It keeps the precision measured at its start, whatever is measured now."""
    flags = {"updates": 2, "save_every": 1, "precision": "auto"}
    monkeypatch.setattr("lib.checkpoint.detect_dtype", lambda *_: "bf16")
    whole = grpo(tmp_path / "whole", sft, **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-2")
    monkeypatch.setattr("lib.checkpoint.detect_dtype", lambda *_: "fp32")
    parts = grpo(tmp_path / "parts", sft, resume=True, **flags)
    assert same_weights(*(load_model(tmp_path / name / "step-2")[0] for name in ("whole", "parts")))
    assert [row["loss"] for row in whole] == [row["loss"] for row in parts]
    assert 1e-4 < max(row["logp_diff_max"] for row in parts) < 0.5, "bf16"


def poison(monkeypatch, updates: set[int]) -> None:
    """Make the gradient infinite in some updates, numbered from 1."""
    real, calls = training.accumulate_gradients, iter(range(1, 100))

    def poisoned(master, *rest):
        metrics = real(master, *rest)
        if next(calls) in updates:
            next(w for w in master.parameters() if w.grad is not None).grad.view(-1)[0] = math.inf
        return metrics

    monkeypatch.setattr(training, "accumulate_gradients", poisoned)


def test_an_update_that_is_not_finite_is_skipped_and_counted(sft, tmp_path, monkeypatch):
    poison(monkeypatch, {2})
    rows = grpo(tmp_path / "run", sft, updates=3, save_every=1, group_size=8, temperature=1.5)
    assert [row["skipped"] for row in rows] == [False, True, False] and rows[1]["grad_norm"] is None
    weights = [load_model(tmp_path / "run" / f"step-{n}")[0] for n in (1, 2, 3)]
    assert same_weights(*weights[:2]) and not same_weights(*weights[1:])


def test_an_update_of_which_one_step_was_skipped_says_so(sft, tmp_path, monkeypatch):
    poison(monkeypatch, {4})
    flags = {"updates": 2, "minibatches": 2, "group_size": 8, "temperature": 1.5}
    rows = grpo(tmp_path / "run", sft, **flags)
    assert [row["skipped"] for row in rows] == [False, True]


def test_after_five_such_updates_the_run_stops(sft, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, set(range(3, 100)))
    with pytest.raises(SystemExit) as stop:
        grpo(tmp_path / "run", sft, updates=20, save_every=1, group_size=8)
    lines = capsys.readouterr().err.splitlines()
    warning, line = [line for line in lines if "not finite" in line]
    assert stop.value.code == 2 and "--lr" in line
    assert "an update was skipped" in warning, "said once"
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 6, (
        "the seventh update was the fifth in a row"
    )
    model, _ = load_model(find_checkpoint(str(tmp_path / "run")))
    assert all(weight.isfinite().all() for weight in model.parameters())


def test_sft_skips_such_updates_too(tmp_path, monkeypatch):
    """Here it is the loss that is not finite."""
    real, calls = train_sft.loss_sum, iter(range(1, 100))
    monkeypatch.setattr(
        train_sft, "loss_sum", lambda *args: real(*args) * (math.nan if next(calls) == 2 else 1)
    )
    flags = {"field": 3, "steps": "1-2", "batch_size": 1, "precision": "fp32", "save_every": 1}
    train_sft.main(train_sft.SftConfig(out=str(tmp_path / "run"), updates=3, **flags), ONE)
    rows = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [row["skipped"] for row in rows] == [False, True, False] and rows[1]["loss"] is None
    weights = [load_model(tmp_path / "run" / f"step-{n}")[0] for n in (1, 2, 3)]
    assert same_weights(*weights[:2]) and not same_weights(*weights[1:])


def test_a_policy_of_nan_is_noticed(sft, tmp_path, capsys):
    """Although no response is right, so no group has signal and no gradient is computed."""
    start = shutil.copytree(find_checkpoint(str(sft)), tmp_path / "start")
    (start / "manifest.json").unlink()
    weights = load_file(start / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit) as stop:
        grpo(tmp_path / "run", start, updates=9)
    assert stop.value.code == 2 and "not finite in five updates" in capsys.readouterr().err


def test_a_warning_is_printed_once_in_a_run(sft, tmp_path, monkeypatch, capsys):
    """With --max-new-tokens 1 no response ever ends."""
    monkeypatch.setattr("lib.diagnose.DIAGNOSE_WINDOW", 3)
    grpo(tmp_path / "run", sft, updates=6, max_new_tokens=1)
    assert capsys.readouterr().err.count("--max-new-tokens") == 1


def test_compositions_under_shown_names_in_another_field(tmp_path):
    """Set the flags that the main job leaves at their defaults, from SFT to the report."""
    task = {"steps": "1-2", "parts": "2-3", "field": 13, "relabel": "shown"}
    init = tmp_path / "sft"
    train_sft.main(train_sft.SftConfig(updates=2, batch_size=4, out=str(init), **task), ONE)
    others = {
        "advantage": "mean",
        "temperature": 0.7,
        "evaluation_share": 0.9,
        "max_new_tokens": 9,
        "updates": 1,
    }
    (row,) = grpo(tmp_path / "rl", init, **task, **others)
    assert row["frac_truncated"] > 0 and row["accuracy/composition"] is not None
    kept = (tmp_path / "rl" / "responses.jsonl").read_text().splitlines()
    for problem in (parse_prompt(json.loads(line)["prompt"], 13) for line in kept):
        assert len(problem.parts) in (2, 3) and problem.field.p == 13 and problem.shown
        assert all(len(part.steps) in (1, 2) for part in problem.parts)
    metrics = json.loads((tmp_path / "rl" / "evaluation.json").read_text())
    assert set(metrics["after"]["by_type"]) == {"composition"}


def test_two_processes(sft, tmp_path):
    """torchrun with two processes trains and reports; only one of them writes and prints."""
    flags = "--field=3 --steps=1-2 --prompts-per-update=4 --group-size=4 --eval-problems=8"
    flags += " --updates=2 --beta=0.05 --precision=fp32"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(HERE / "train_grpo.py"), "--init", str(sft), "--out", str(tmp_path / "two")]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    options = {"capture_output": True, "text": True, "env": environment}
    done = subprocess.run([*command, *flags.split()], **options)
    assert done.returncode == 0, done.stderr
    rows = read_log(tmp_path / "two" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["logp_diff_max"] < 1e-4
    one = grpo(tmp_path / "one", sft, updates=1)
    kinds = [{key for key in row if key.startswith("accuracy/")} for row in (rows[0], one[0])]
    assert kinds[0] == kinds[1], "the same problems"
    assert rows[0]["reward"] == one[0]["reward"] and rows[0]["entropy"] == pytest.approx(
        one[0]["entropy"], abs=1e-5
    )
    assert rows[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-4), (
        "and the same responses"
    )
    assert done.stdout.count("checkpoint  ") == 1, "one process prints"


def test_the_main_job_trains_sft_first_where_it_is_missing(tmp_path, monkeypatch, capsys):
    """An SFT run that was interrupted is resumed, not started again."""
    monkeypatch.chdir(tmp_path)
    short = train_sft.SftConfig

    def quick(**flags):
        return short(steps="1-2", updates=4, batch_size=4, save_every=2, warmup=0, **flags)

    monkeypatch.setattr(train_sft, "SftConfig", quick)
    grpo_config = train_grpo.GrpoConfig(updates=1, **SMALL)
    train_grpo.main(grpo_config, ONE)
    assert "training one first" in capsys.readouterr().out
    assert Path("ckpt/sft-mixed-gf3/step-4").is_dir() and Path("ckpt/grpo-1-2-gf3/step-1").is_dir()

    shutil.rmtree("ckpt/sft-mixed-gf3/step-4")
    shutil.rmtree("ckpt/grpo-1-2-gf3")
    train_grpo.main(train_grpo.GrpoConfig(updates=1, **SMALL), ONE)
    assert "training one first" in capsys.readouterr().out
    rows = read_log(Path("ckpt/sft-mixed-gf3/metrics.jsonl"))
    assert [row["update"] for row in rows] == [1, 2, 3, 4]

    shutil.rmtree("ckpt/grpo-1-2-gf3")
    train_grpo.main(train_grpo.GrpoConfig(updates=1, **SMALL), ONE)
    assert "training one first" not in capsys.readouterr().out


def test_the_main_job_does_not_start_from_a_trial(tmp_path, monkeypatch, capsys):
    """A short SFT run in the default folder is refused as a start, unless --init names it."""
    monkeypatch.chdir(tmp_path)
    trial = train_sft.main(
        train_sft.SftConfig(field=3, steps="1-2", updates=2, batch_size=4, precision="fp32"), ONE
    )
    assert trial == Path("ckpt/sft-mixed-gf3/step-2")
    line = refusal(lambda: train_grpo.main(train_grpo.GrpoConfig(updates=1, **SMALL), ONE), capsys)
    assert "ckpt/sft-mixed-gf3 was trained with --" in line and "--init" in line
    grpo(tmp_path / "named", Path("ckpt/sft-mixed-gf3"), updates=1)


def test_sft_of_a_pretrained_model_has_another_default_folder(tmp_path, monkeypatch, pretrained):
    monkeypatch.chdir(tmp_path)
    flags = {
        "model": str(pretrained),
        "field": 3,
        "steps": "1-2",
        "updates": 1,
        "batch_size": 2,
        "precision": "fp32",
    }
    assert train_sft.main(train_sft.SftConfig(**flags), ONE) == Path(
        "ckpt/sft-mixed-gf3-pretrained/step-1"
    )


@pytest.fixture
def stepped(monkeypatch) -> list[tuple[float, float]]:
    """The learning rates and weight decays at which the optimizer has stepped."""
    rates, real = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append((self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]))
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return rates


def test_the_learning_rate_warms_up_and_decays_to_zero(sft, tmp_path, monkeypatch, stepped):
    """RL has no weight decay."""
    rewards = itertools.count()  # so that every group has a signal
    monkeypatch.setattr(Problem, "reward", lambda *_: float(next(rewards)))
    grpo(tmp_path / "rl", sft, updates=10, warmup=2, lr=1e-3, save_every=10)
    remaining = [min(1, (i + 1) / 3, (10 - i) / 8) for i in range(10)]  # linear
    assert [lr for lr, _ in stepped] == pytest.approx([1e-3 * share for share in remaining])
    assert {decay for _, decay in stepped} == {0.0}
    stepped.clear()
    flags = SFT_FLAGS | {"updates": 10, "warmup": 2, "lr": 1e-3, "weight_decay": 0.3}
    train_sft.main(train_sft.SftConfig(out=str(tmp_path / "sft"), **flags), ONE)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(10)]
    expected = [1e-3 * min(1, (i + 1) / 2) * share for i, share in enumerate(cosine)]
    assert [lr for lr, _ in stepped] == pytest.approx(expected)
    assert {decay for _, decay in stepped} == {0.3}
    rows = read_log(tmp_path / "sft" / "metrics.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx(expected)


SFT_FLAGS = {"field": 3, "steps": "1-2", "batch_size": 5, "precision": "fp32", "position_gap": 0}


class Alone:
    """World's collectives for one process that takes itself for one of several."""

    all_reduce = staticmethod(lambda *values: list(values))
    all_gather = staticmethod(lambda rows: rows)

    def __init__(self, monkeypatch):
        for name in ("all_reduce", "all_gather"):
            function = getattr(self, name)
            monkeypatch.setattr(World, name, lambda self, *args, function=function: function(*args))
        for name in ("barrier", "all_reduce_gradients"):
            monkeypatch.setattr(World, name, lambda *_: None)


def test_processes_share_an_updates_problems_between_them(sft, tmp_path, monkeypatch):
    """Two of them train on all that one does, each on other problems; random numbers go along."""
    drawn: dict[int, list] = {}
    real = train_grpo.Sampler.sample

    def sample(self, prompts, keys):
        if keys[0][1] == "sampling":
            drawn[rank] += [list(zip(map(tuple, prompts), keys))]
        return real(self, prompts, keys)

    monkeypatch.setattr(train_grpo.Sampler, "sample", sample)
    Alone(monkeypatch)
    flags = SMALL | {"init": str(sft), "updates": 2, "prompts_per_update": 5, "save_every": 9}
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        rank, drawn[rank] = size * 10 + rank, []
        config = train_grpo.GrpoConfig(out=str(tmp_path / str(rank)), **flags)
        train_grpo.main(config, World(rank % 10, size, torch.device("cpu")))
    for whole, *parts in zip(drawn[10], drawn[20], drawn[21]):
        assert [len(part) for part in parts] == [3, 2] and len(set(whole)) == 5
        assert sorted(parts[0] + parts[1]) == sorted(whole)


def test_processes_share_an_updates_examples_between_them(tmp_path, monkeypatch):
    """The same of SFT."""
    drawn: dict[int, list] = {}
    real = train_sft.make_batch

    def make_batch(tokenizer, examples, *args):
        if len(args) > 1:  # not the validation problems
            drawn[rank] += [(problem, solution) for problem, solution in examples]
        return real(tokenizer, examples, *args)

    monkeypatch.setattr(train_sft, "make_batch", make_batch)
    Alone(monkeypatch)
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        rank, drawn[rank] = size * 10 + rank, []
        config = train_sft.SftConfig(out=str(tmp_path / str(rank)), updates=2, **SFT_FLAGS)
        train_sft.main(config, World(rank % 10, size, torch.device("cpu")))
    assert len(drawn[10]) == 10 and (len(drawn[20]), len(drawn[21])) == (6, 4)
    assert sorted(map(repr, drawn[20] + drawn[21])) == sorted(map(repr, drawn[10]))


def test_the_tour_needs_its_start(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal(lambda: tour.main(tour.TourConfig(), ONE), capsys)
    assert "there is no folder ckpt/sft-mixed-gf11" in line


def test_the_tour_names_lines_of_the_code():
    """So that a reader finds what it changes."""
    rewards = torch.tensor([[0.0, 1.0]])
    rollout = Rollout(*[torch.zeros(1)] * 6, scored=[[]], rewards=rewards, advantages=rewards)
    for where, line, *_ in tour.experiments(rollout, 1.0):
        file, name = where.split(", ")
        code = "".join((HERE / file).read_text().split())
        assert name.split(".")[-1] in code
        assert all("".join(piece.split()) in code for piece in line.split("...")), line


def test_the_tour_shows_a_step_that_helps_and_five_changes(sft, capsys):
    """Its numbers are those of the run: a step makes right responses likelier, wrong ones rarer."""
    tour.main(tour.TourConfig(init=str(sft), steps="1-2"), ONE)
    out = capsys.readouterr().out
    assert all(f"\n{i}. " in out for i in range(1, 7)) and out.count("--> ") == 5
    assert all(len(line) <= 100 for line in out.splitlines())
    changes = re.findall(r"right responses ([-+.\d]+), of wrong ones ([-+.\d]+);", out)
    right, wrong = ([float(pair[i]) for pair in changes] for i in range(2))
    assert len(changes) == 6 and right[0] > wrong[0], "the step itself"
    assert right[1] > right[0] - 0.01 and wrong[1] > wrong[0], "no baseline: nothing pushes down"
    assert right[2] < 0 < wrong[2], "the loss with its sign turned"
    table = out.split("first error  reward  advantage\n")[1].split("\n\n")[0].splitlines()
    rewards, advantages = ([float(line.split()[i]) for line in table] for i in (-2, -1))
    assert len(set(rewards)) == 2 and sum(advantages) == pytest.approx(0, abs=0.01)
