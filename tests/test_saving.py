"""Saving: a thread that writes while training goes on, and checkpoints of adapters alone."""

import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    draw_nothing,
    make_pretrained,
    refusal,
    same_weights,
    small_model,
    word_tokenizer,
)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import eval
import strategies
import train_grpo
import train_sft
from lib import checkpoint, files, training
from lib.checkpoint import checkpoints, load_model
from lib.distributed import World, distributed
from lib.files import sha256, verify_manifest
from lib.flags import fail
from lib.lora import adapted, add_lora, peft_weights
from lib.policy import trainable_parameters
from lib.run_dir import read_log, save_checkpoint, saved_merged

ONE = World(0, 1, torch.device("cpu"))
ROOT = Path(train_sft.__file__).parent
TASK = {"field": 3, "steps": "1-2", "save_every": 1, "keep": 0, "precision": "fp32"}
SFT = TASK | {
    "updates": 3,
    "examples": 12,
    "batch_size": 4,
    "warmup": 0,
    "lr": 1e-2,
    "max_new_tokens": 8,
}
GRPO = TASK | {"updates": 3, "prompts_per_update": 4, "group_size": 4, "eval_problems": 4}
GRPO |= {"lora": 2, "lr": 1e-2, "temperature": 1.5, "keep_responses": 0}
pytestmark = pytest.mark.usefixtures("undrawn")


def sft(out: Path, **flags) -> Path:
    return train_sft.main(train_sft.SftConfig(out=str(out), **(SFT | flags)), ONE)


def grpo(out: Path, init: Path, **flags) -> Path:
    train_grpo.main(train_grpo.GrpoConfig(init=str(init), out=str(out), **(GRPO | flags)), ONE)
    return out / "step-3"


# ------------------------------------------------------------------------------------------------
# The thread


@pytest.fixture
def gate():
    """An event that the writer waits for."""
    event = threading.Event()
    files.writer.submit(event.wait)
    yield event
    event.set()


@pytest.mark.parametrize("lora", [0, 2])
def test_what_training_changes_meanwhile_does_not_reach_the_checkpoint(
    lora, gate, tmp_path, pretrained
):
    model, tokenizer = small_model(), word_tokenizer(11)
    meta = {}
    if lora:
        base, tokenizer = load_model(pretrained)
        model = add_lora(base, lora, 4, 0.0, torch.Generator().manual_seed(0))
        meta = {"lora": lora, "lora_alpha": 4, "lora_dropout": 0.0, "init_name": "", "total": 9}
    weights = trainable_parameters(model)
    optimizer = torch.optim.AdamW(weights, fused=True)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    saving = save_checkpoint(tmp_path, 1, model, tokenizer, optimizer, meta)
    with torch.no_grad():
        for _ in range(3):
            optimizer.step()
    optimizer.param_groups[0]["lr"] = 5.0
    assert not saving.done() and not list(tmp_path.glob("*step-1*")), "training does not wait"
    gate.set()
    folder = saving.result()

    if lora:
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        for linear in adapted(model).values():  # put what was saved into the model
            linear.adapter.a.data.zero_(), linear.adapter.b.data.zero_()
        for name, weight in peft_weights(model).items():
            weight.copy_(saved[name])
        found = weights
    else:
        found = load_model(folder)[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))
    state = torch.load(folder / "training_state.pt")
    assert state["param_groups"][0]["lr"] == 1e-3
    for i, weight in enumerate(before):
        assert state["state"][i]["step"] == 1
        torch.testing.assert_close(state["state"][i]["exp_avg"], torch.full_like(weight, 0.1))


def after(monkeypatch, update: int, act) -> None:
    """Call `act(run)` in the update of this number."""
    real, calls = training.optimizer_step, iter(range(1, 1000))

    def step(run, *args):
        if next(calls) == update:
            act(run)
        return real(run, *args)

    monkeypatch.setattr(training, "optimizer_step", step)


def test_an_error_of_the_thread_ends_the_run_at_the_next_update(tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    after(monkeypatch, 3, lambda run: wait_for(run.saving.done))
    with pytest.raises(SystemExit) as stop:
        sft(tmp_path, updates=20, save_every=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line]
    assert stop.value.code == 2 and len(lines) == 1
    assert "cannot write the checkpoint" in lines[0] and "is the disk full?" in lines[0]
    assert len(read_log(tmp_path / "metrics.jsonl")) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def wait_for(happened) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("due", [True, False])
def test_a_signal_during_a_save_stops_when_all_is_on_the_disk(
    due, gate, tmp_path, monkeypatch, capsys
):
    """The save that is under way, and that of the signal's own update."""
    there = []

    def interrupt(run):
        assert not run.saving.done()
        signal.raise_signal(signal.SIGTERM)
        threading.Timer(0.3, gate.set).start()

    def warn(message):
        if "stopped and saved" in message:
            there.extend(checkpoints(tmp_path))

    after(monkeypatch, 2 if due else 3, interrupt)
    monkeypatch.setattr(training, "warn", warn)
    with pytest.raises(SystemExit) as stop:
        sft(tmp_path, updates=20, save_every=1 if due else 2)
    assert stop.value.code == 128 + signal.SIGTERM
    assert [path.name for path in there] == (["step-1", "step-2"] if due else ["step-2", "step-3"])
    assert not any(map(verify_manifest, there))


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_error_waits_for_the_checkpoint_that_is_being_written(world_size, tmp_path, monkeypatch):
    """With several processes it ends in os._exit, which would cut the writer off."""
    world = World(0, world_size, torch.device("cpu"))
    monkeypatch.setattr("lib.distributed.init_distributed", lambda: world)
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"{(tmp_path / 'x').exists()}"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        ends = pytest.raises((ZeroDivisionError, pytest.fail.Exception))
        with ends as ended, distributed():
            files.writer.submit(lambda: (time.sleep(0.5), (tmp_path / "x").touch()))
            raise ZeroDivisionError
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "x").exists() and str(ended.value) in ("", "True")


def test_a_checkpoint_appears_behind_the_rows_that_it_needs(tmp_path, monkeypatch):
    """Log and responses of its updates are on the disk before it has its name.

    And the last one before the final evaluation, however slow the disk is.
    """
    model, tokenizer = small_model(), word_tokenizer(3)
    optimizer = torch.optim.AdamW(model.parameters())
    start = save_checkpoint(tmp_path / "start", 1, model, tokenizer, optimizer, {}).result()
    synced, appeared = set(), []
    real_sync, real_replace, real_end = files.fsync, os.replace, training.end_update

    def fsync(path: Path) -> None:
        real_sync(path)
        synced.add(path.name)

    def replace(old: Path, new: Path) -> None:
        time.sleep(0.05)
        assert {"metrics.jsonl", "responses.jsonl", "training_state.pt"} <= synced
        update = int(new.name[5:])
        for name in ("metrics.jsonl", "responses.jsonl"):
            rows = read_log(tmp_path / "run" / name)
            assert update in {row["update"] for row in rows}
        real_replace(old, new)
        synced.clear()
        appeared.append(update)

    def end_update(run, update, *args) -> None:
        real_end(run, update, *args)
        if update + 1 == run.updates:
            assert appeared == [1, 2, 3]

    monkeypatch.setattr(files, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(training, "end_update", end_update)
    grpo(tmp_path / "run", start, lora=0, keep_responses=2)
    assert appeared == [1, 2, 3]


def test_a_run_whose_start_is_gone_reports_its_end(tmp_path, monkeypatch, capsys):
    model, tokenizer = small_model(), word_tokenizer(3)
    optimizer = torch.optim.AdamW(model.parameters())
    start = save_checkpoint(tmp_path / "start", 1, model, tokenizer, optimizer, {}).result()
    monkeypatch.setattr(training, "initial_policy", lambda run: fail("gone"))
    grpo(tmp_path / "run", start, lora=0)
    out = capsys.readouterr().out
    assert "\nafter RL, 4 samples" in out and "->" not in out


# ------------------------------------------------------------------------------------------------
# Adapters alone


def reward_length(monkeypatch) -> None:
    """Reward something that a random model does, so that RL trains."""
    real = strategies.score_response

    def score(problem, text, stopped):
        return replace(real(problem, text, stopped), reward=float(len(text) % 2))

    monkeypatch.setattr(strategies, "score_response", score)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """models/small in bf16, SFT from it with LoRA (sft), RL from its adapters of step 2 (rl)."""
    folder = tmp_path_factory.mktemp("made")
    small = make_pretrained(folder / "models" / "small", "qwen2", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16).save_pretrained(small)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        reward_length(patch)
        sft(folder / "sft", model=str(small), lora=2)
        grpo(folder / "rl", folder / "sft" / "step-2")
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy of it, in which the starts are found beside the runs; the old place is gone."""
    folder = Path(shutil.copytree(made, tmp_path / "copy"))
    made.rename(made.with_name("gone"))
    yield folder
    made.with_name("gone").rename(made)


def merge(*words) -> None:
    checkpoint.main(checkpoint.MergeConfig(["merge", *map(str, words)]))


def weights_by_hand(start: Path, with_adapters: Path) -> dict:
    """The start's weights in fp32 plus alpha / rank * B A."""
    weights = {name: w.float() for name, w in load_file(start / "model.safetensors").items()}
    adapters = load_file(with_adapters / "adapter" / "adapter_model.safetensors")
    for name in weights:
        parts = [f"base_model.model.{name[:-7]}.lora_{letter}.weight" for letter in "AB"]
        if parts[0] in adapters:
            a, b = map(adapters.get, parts)
            assert b.abs().max() > 0
            weights[name] = weights[name] + 128 / 2 * (b @ a)
    return weights


def test_only_the_last_checkpoint_of_a_run_holds_the_merged_model(place, tmp_path, monkeypatch):
    for run in (place / "sft", place / "rl"):
        for folder in checkpoints(run):
            merged = (folder / "model.safetensors").exists()
            assert verify_manifest(folder) is None and merged == (folder.name == "step-3")
            assert {"adapter", "training_state.pt", "tokenizer.json"} < {
                path.name for path in folder.iterdir()
            }


def test_merging_writes_what_the_last_checkpoint_has(place, tmp_path):
    """Byte for byte, equal to the sum by hand; also where the start holds adapters alone itself."""
    for run in (place / "sft", place / "rl"):
        alone = Path(shutil.copytree(run / "step-3", run / "step-4"))
        (alone / "model.safetensors").unlink(), (alone / "manifest.json").unlink()
        merge(run, tmp_path / run.name)  # of a run the newest
        ours, theirs = (
            folder / "model.safetensors" for folder in (tmp_path / run.name, run / "step-3")
        )
        assert ours.read_bytes() == theirs.read_bytes()
        assert verify_manifest(tmp_path / run.name) is None
        names = {path.name for path in (tmp_path / run.name).iterdir()}
        assert names == {path.name for path in (run / "step-3").iterdir()} - {
            "adapter",
            "training_state.pt",
        }
    for folder, start in (
        (place / "sft" / "step-2", place / "models" / "small"),
        (place / "rl" / "step-1", tmp_path / "step-2"),
    ):
        merge(folder, tmp_path / folder.name)
        found = load_file(tmp_path / folder.name / "model.safetensors")
        expected = weights_by_hand(start, folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    AutoModelForCausalLM.from_pretrained(tmp_path / "step-2")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluation_of_adapters_alone_equals_that_of_the_merged_model(precision, place, tmp_path):
    merge(place / "sft" / "step-2", tmp_path / "merged")
    metrics = []
    for folder in (place / "sft" / "step-2", tmp_path / "merged"):
        flags = {"problems": 8, "steps": "1-2", "precision": precision, "max_new_tokens": 8}
        flags |= {"json": str(tmp_path / "metrics.json")}
        eval.main(eval.EvalConfig([str(folder)], **flags), ONE)
        metrics.append(json.loads((tmp_path / "metrics.json").read_text()))
        assert metrics[-1].pop("checkpoints") == [str(folder)]
    assert metrics[0] == metrics[1]
    models = [load_model(x)[0] for x in (place / "sft" / "step-2", tmp_path / "merged")]
    assert same_weights(*models)


def test_runs_start_and_resume_from_either_kind(place, tmp_path, monkeypatch):
    """RL from adapters alone equals RL from the merged model; both kinds resume exactly."""
    reward_length(monkeypatch)
    merge(place / "sft" / "step-2", tmp_path / "merged")
    whole = grpo(tmp_path / "rl", tmp_path / "merged")
    assert sha256(whole / "model.safetensors") == sha256(
        place / "rl" / "step-3" / "model.safetensors"
    )
    all_weights = [
        grpo(tmp_path / name, start, lora=0, lr=1e-4)
        for name, start in (("a", place / "sft" / "step-2"), ("b", tmp_path / "merged"))
    ]
    assert same_weights(*(load_model(folder)[0] for folder in all_weights))

    for name, kind in (("one", "alone"), ("two", "merged")):
        run = Path(shutil.copytree(place / "rl", place / name))
        shutil.rmtree(run / "step-3")
        if kind == "merged":  # as every checkpoint was once
            merge(run / "step-2", tmp_path / "sum")
            (tmp_path / "sum" / "model.safetensors").rename(run / "step-2" / "model.safetensors")
        again = grpo(run, place / "sft" / "step-2", resume=True)
        assert sha256(again / "model.safetensors") == sha256(whole / "model.safetensors")
        assert sha256(again / "training_state.pt") == sha256(
            place / "rl" / "step-3" / "training_state.pt"
        )


def test_a_last_checkpoint_is_saved_though_the_start_of_its_start_is_gone(
    place, monkeypatch, capsys
):
    reward_length(monkeypatch)
    shutil.rmtree(place / "rl" / "step-3")
    after(monkeypatch, 1, lambda _: shutil.rmtree(place / "models"))
    capsys.readouterr()
    end = grpo(place / "rl", place / "sft" / "step-2", resume=True, beta=0.05)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "lacks its own" in line]
    assert f"{end} holds adapters alone" in line
    assert verify_manifest(end) is None and not (end / "model.safetensors").exists()


def test_a_merge_that_does_not_fit_in_memory_costs_no_adapters(monkeypatch, tmp_path):
    monkeypatch.setattr("lib.run_dir.load_model", lambda _: torch.empty(10**15))
    assert not saved_merged(tmp_path) and not any(tmp_path.iterdir())


def change_start(place: Path) -> None:
    file = place / "models" / "small" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")


REFUSED = {
    "no adapters": (lambda place: None, ("models/small", "new"), "models/small holds a whole"),
    "merged": (lambda place: None, ("sft", "new"), "sft/step-3 holds a whole model"),
    "start gone": (
        lambda place: shutil.rmtree(place / "models"),
        ("sft/step-1", "new"),
        "models/small is gone, has changed or",
    ),
    "start changed": (change_start, ("sft/step-1", "new"), "models/small is gone, has changed or"),
    "start of the start gone": (
        lambda place: shutil.rmtree(place / "models"),
        ("rl/step-1", "new"),
        "sft/step-2 is gone, has changed or lacks its own start; rl/step-1 holds",
    ),
    "folder exists": (lambda place: None, ("sft/step-1", "rl"), "rl exists already"),
    "no folder": (lambda place: None, ("sft/step-1",), "say: python -m lib.checkpoint merge"),
    "no run": (lambda place: None, ("nowhere", "new"), "there is no folder nowhere"),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_cannot_be_merged_is_refused(how, place, monkeypatch, capsys):
    spoil, words, says = REFUSED[how]
    monkeypatch.chdir(place)
    spoil(place)
    before = sorted(place.rglob("*"))
    assert says in refusal(lambda: merge(*words), capsys)
    assert sorted(place.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:'lib.checkpoint' found in sys.modules")
def test_the_command(place, tmp_path, monkeypatch, capsys):
    new = str(tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", "merge", str(place / "sft" / "step-1"), new])
    runpy.run_module("lib.checkpoint", run_name="__main__", alter_sys=True)
    assert capsys.readouterr() == (f"{new}\n", "")
    assert AutoModelForCausalLM.from_pretrained(new).dtype == torch.float32


def test_a_merge_that_fails_leaves_nothing(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "fsync", lambda _: 1 / 0)
    line = refusal(lambda: merge(place / "sft" / "step-1", tmp_path / "new"), capsys)
    assert "cannot write the checkpoint" in line
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.parametrize("large", [True, False])
def test_a_save_of_a_pretrained_model_is_waited_for(large, tmp_path, pretrained, monkeypatch):
    """Its copy would add to the next update's memory; a tiny model's is small."""
    gate, waited, freed, end_update = threading.Event(), [], [], training.end_update
    files.writer.submit(gate.wait)
    threading.Timer(0.3, gate.set).start()

    def end_and_look(run, *args):
        end_update(run, *args)
        waited.append(run.saving.done())

    monkeypatch.setattr(training, "end_update", end_and_look)
    monkeypatch.setattr(training, "return_memory", lambda: freed.append(1))
    validated = {"accuracy": 1.0, "accuracy_given_match": 1.0}
    monkeypatch.setattr(train_sft, "validation_metrics", lambda *_: validated)
    flags = {"model": str(pretrained), "lora": 2} if large else {}
    sft(tmp_path / "run", updates=2, **flags)
    assert waited[0] == large and len(freed) == 4, "in each step, and before each save"
