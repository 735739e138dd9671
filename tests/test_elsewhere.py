"""Other people's machines: moved, linked and deleted folders, other readers, odd file systems."""

import errno
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
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
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_grpo
import train_sft
from data.finite_field import Problem
from lib import checkpoint, run_dir, training
from lib.checkpoint import (
    checkpoints,
    find_checkpoint,
    load_meta,
    load_model,
    newest_checkpoint,
)
from lib.distributed import Signals, World
from lib.files import verify_manifest
from lib.run_dir import choose_checkpoints, read_log, save_checkpoint
from lib.tokenizer import load_tokenizer

ONE = World(0, 1, torch.device("cpu"))
ROOT = Path(train_sft.__file__).parent
TASK = {"field": 3, "steps": "1-2", "precision": "fp32", "save_every": 1, "keep": 0}
TASK |= {"max_new_tokens": 8}  # of a byte tokenizer, which would make a hundred
SFT = TASK | {"updates": 2, "examples": 8, "batch_size": 2, "warmup": 0}
GRPO = TASK | {
    "updates": 2,
    "prompts_per_update": 2,
    "group_size": 2,
    "eval_problems": 2,
    "keep_responses": 0,
}
pytestmark = pytest.mark.usefixtures("undrawn")


def sft(out: Path | str, **flags) -> Path:
    return train_sft.main(train_sft.SftConfig(out=str(out), **(SFT | flags)), ONE)


def grpo(out: Path | str, init: Path | str, **flags) -> Path:
    config = train_grpo.GrpoConfig(init=str(init), out=str(out), **(GRPO | flags))
    train_grpo.main(config, ONE)
    return newest_checkpoint(Path(out))


def save_tiny(run: Path, update: int, **meta) -> Path:
    model = small_model(update)
    optimizer = torch.optim.AdamW(model.parameters())
    return save_checkpoint(run, update, model, word_tokenizer(11), optimizer, meta).result()


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project folder with a model, SFT with LoRA from it, and RL with LoRA from that."""
    folder = tmp_path_factory.mktemp("old") / "project"
    make_pretrained(folder / "models" / "small")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_nothing(patch)
        sft("ckpt/sft", model="models/small", lora=2)
        grpo("ckpt/rl", "ckpt/sft", lora=2)
    return folder


@pytest.fixture
def moved(project, tmp_path, monkeypatch) -> Path:
    """A copy of it; the old place is gone."""
    folder = Path(shutil.copytree(project, tmp_path / "new place"))
    project.rename(project.with_name("gone"))
    monkeypatch.chdir(folder)
    yield folder
    project.with_name("gone").rename(project)


# ------------------------------------------------------------------------------------------------
# Our checkpoints in other hands


@pytest.mark.parametrize("umask, mode", [(0o027, 0o640), (0o002, 0o664)])
def test_files_follow_the_umask(umask, mode, tmp_path, pretrained):
    before = os.umask(umask)
    try:
        folders = [save_tiny(tmp_path, 1), sft(tmp_path / "run", model=str(pretrained), lora=2)]
    finally:
        os.umask(before)
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    assert {"model.safetensors", "adapter_model.safetensors"} <= {file.name for file in files}
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_is_saved_as_it_came(kind, tmp_path):
    """transformers 5 calls what it saves TokenizersBackend, which transformers 4 does not know."""
    start = make_pretrained(tmp_path / "start", "qwen2" if "Qwen2" in kind else "llama")
    config = json.loads((start / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": kind, "added_tokens_decoder": {}}
    (start / "tokenizer_config.json").write_text(json.dumps(config))
    (start / "additional_chat_templates").mkdir()
    (start / "additional_chat_templates" / "other.jinja").write_text("{{ messages }}")
    end = tmp_path / "end"
    if kind == "Qwen2Tokenizer":
        end = grpo(tmp_path / "rl", sft(tmp_path / "sft", model=str(start), lora=2), lora=2)
    else:
        end.mkdir()
        load_tokenizer(start).save(end)
        for file in (start / "config.json", start / "generation_config.json"):
            shutil.copy(file, end)
    for file in (
        "tokenizer.json",
        "tokenizer_config.json",
        "additional_chat_templates/other.jinja",
    ):
        assert (end / file).read_bytes() == (start / file).read_bytes()
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (start, end))
    text = "start e9\n29: * e3"
    assert type(before) is type(after) and before.encode(text) == after.encode(text)
    assert before.get_chat_template() == after.get_chat_template()


def test_a_tokenizer_of_transformers_5_opens_in_4(pretrained, tmp_path):
    """Its class is then one that both know, and a list that 4 cannot read has its old name."""
    path = pretrained / "tokenizer_config.json"
    config = json.loads(path.read_text())
    assert config["tokenizer_class"] == "TokenizersBackend"
    path.write_text(json.dumps(config | {"extra_special_tokens": ["<|im_start|>"]}))
    tokenizer = load_tokenizer(pretrained)
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in saved
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.encode("start e9") == tokenizer.inner.encode("start e9")
    assert again.get_chat_template() == tokenizer.inner.get_chat_template()


def test_a_tokenizer_saved_without_its_template_stays_without(pretrained, tmp_path):
    config = json.loads((pretrained / "tokenizer_config.json").read_text())
    template = (pretrained / "chat_template.jinja").read_text()
    (pretrained / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": template})
    )
    for chat in (True, False):
        tokenizer = load_tokenizer(pretrained, chat_template=chat)
        (tmp_path / str(chat)).mkdir()
        tokenizer.save(tmp_path / str(chat))
        again = load_tokenizer(tmp_path / str(chat)).inner
        assert (again.chat_template is not None) == chat
        other = AutoTokenizer.from_pretrained(tmp_path / str(chat))
        assert (other.chat_template is not None) == chat and other.eos_token == "<|im_end|>"


def test_autotokenizer_reads_the_tiny_models_words(tmp_path):
    """Its config.json says qwen2, for which transformers 5 would put Qwen2's own tokenizer."""
    folder, ours = save_tiny(tmp_path, 1), word_tokenizer(11)
    theirs = AutoTokenizer.from_pretrained(folder)
    text = "start e9\n29: * e3\n30: + e4\nend ?\nsolution:\n"
    assert theirs.encode(text) == ours.inner.encode(text) and len(theirs) == len(ours)
    assert theirs.decode(theirs.encode(text)).split() == text.split()
    assert theirs.eos_token_id == ours.inner.eos_token_id
    load_tokenizer(folder).save(tmp_path)  # as a run does that begins from this one
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == theirs.encode(text)


@pytest.mark.parametrize("named", ["someone/small", "models/small"])
def test_peft_finds_the_base_by_the_name_it_was_given(named, tmp_path, monkeypatch):
    """A hub's name stays one; a folder has its whole path, since PEFT may run elsewhere."""
    monkeypatch.chdir(tmp_path)
    folder = make_pretrained(Path("cache" if named == "someone/small" else named).absolute())
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda name, **_: str(folder))
    end = sft("run", model=named, lora=2)
    base = json.loads((end / "adapter" / "adapter_config.json").read_text())
    expected = named if named == "someone/small" else str(folder)
    assert base["base_model_name_or_path"] == expected
    shutil.rmtree(end)
    assert sft("run", model=named, lora=2, resume=True) == end


# ------------------------------------------------------------------------------------------------
# Runs whose start was moved, deleted or changed


def test_a_project_that_was_moved_as_a_whole_resumes(moved, capsys):
    shutil.rmtree("ckpt/rl/step-2"), shutil.rmtree("ckpt/sft/step-2")
    assert choose_checkpoints(["ckpt"])[0] == Path("ckpt/rl/step-1"), "its start is gone"
    assert "is gone" in capsys.readouterr().err
    assert sft("ckpt/sft", model="models/small", lora=2, resume=True) == Path("ckpt/sft/step-2")
    assert choose_checkpoints(["ckpt/rl", "ckpt/sft"])
    os.utime("ckpt/rl/step-1", (2e9, 2e9))
    assert choose_checkpoints(["ckpt"]) == [Path("ckpt/sft/step-2"), Path("ckpt/rl/step-1")]
    end = grpo("ckpt/rl", "ckpt/sft", lora=2, resume=True)
    assert load_meta(end)["init_from"] == str(Path("ckpt/sft/step-2").absolute())
    assert json.loads((end / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(Path("ckpt/sft/step-2").absolute())


def test_a_start_that_was_moved_is_accepted_by_its_weights(moved, tmp_path, capsys):
    shutil.rmtree("ckpt/rl/step-2")
    Path("ckpt/sft").rename(tmp_path / "sft")
    Path("models/small").rename(tmp_path / "small")
    line = refusal(lambda: grpo("ckpt/rl", "ckpt/sft", lora=2, resume=True), capsys)
    assert "there is no folder ckpt/sft" in line
    line = refusal(lambda: grpo("ckpt/rl", tmp_path / "small", lora=2, resume=True), capsys)
    assert "does not hold the weights from which ckpt/rl started: say by --init" in line
    end = grpo("ckpt/rl", tmp_path / "sft", lora=2, resume=True)
    assert end.name == "step-2" and load_meta(end)["init_from"] == str(tmp_path / "sft" / "step-2")
    shutil.rmtree(tmp_path / "sft" / "step-2")
    flags = {"lora": 2, "resume": True}
    line = refusal(lambda: sft(tmp_path / "sft", model="models/small", **flags), capsys)
    assert "there is no folder models/small" in line
    again = sft(tmp_path / "sft", model=str(tmp_path / "small"), **flags)
    assert again == tmp_path / "sft" / "step-2"
    line = refusal(lambda: sft(tmp_path / "sft", model="tiny", lora=0, resume=True), capsys)
    assert "was started with" in line


def lose_the_start(monkeypatch, lose, update: int = 1) -> None:
    """Call `lose` when that many updates are done, before they are saved."""
    real = training.end_update

    def end_update(run, done, *args):
        if done + 1 == update:
            lose()
        real(run, done, *args)

    monkeypatch.setattr(training, "end_update", end_update)


LOST = {
    "deleted": shutil.rmtree,
    "retrained": lambda folder: save_other_weights(folder),
    "cut short": lambda folder: (folder / "model.safetensors").write_bytes(b"x"),
    "spoiled": lambda folder: (folder / "model.safetensors").rename(
        folder / "model.safetensors.index.json"
    ),
}


def save_other_weights(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.lm_head.weight.data[5, 5] += 0.5
    model.save_pretrained(folder)


@pytest.mark.parametrize("precision, how", [("bf16", "deleted"), *(("fp32", how) for how in LOST)])
def test_adapters_are_saved_though_their_start_is_gone(
    precision, how, pretrained, tmp_path, monkeypatch, capsys
):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(Problem, "reward", lambda self, text, stopped: float(len(text)))
    flags = {"lora": 2, "precision": precision, "lr": 1e-2}
    copy, run = shutil.copytree(pretrained, tmp_path / "copy"), tmp_path / "run"
    lose_the_start(monkeypatch, lambda: LOST[how](copy))
    capsys.readouterr()
    end = grpo(run, copy, **flags)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "or merge them" in line]
    assert str(copy) in line and f"'{end}/adapter'" in line
    advice = line.partition(" by PEFT: ")[2]
    assert verify_manifest(end) is None and not (end / "model.safetensors").exists()
    assert "or merge them" in refusal(lambda: load_model(find_checkpoint(str(run))), capsys)

    monkeypatch.undo()
    draw_nothing(monkeypatch)
    monkeypatch.setattr(Problem, "reward", lambda self, text, stopped: float(len(text)))
    shutil.copytree(run, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "step-2")
    line = refusal(lambda: grpo(tmp_path / "parts", copy, resume=True, **flags), capsys)
    assert ("there is no folder" if how == "deleted" else "say by --init where they are") in line
    if how != "deleted":
        return
    whole = grpo(tmp_path / "whole", pretrained, **flags)
    again = grpo(tmp_path / "parts", pretrained, resume=True, **flags)
    assert same_weights(load_model(again)[0], load_model(whole)[0])
    assert not same_weights(load_model(whole)[0], load_model(pretrained)[0])
    names = {"PeftModel": peft.PeftModel, "AutoModelForCausalLM": AutoModelForCausalLM}
    merged = eval(advice, names | {"START": pretrained})  # as the line says
    expected = dict(AutoModelForCausalLM.from_pretrained(whole).named_parameters())
    for name, weight in merged.named_parameters():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-5)


def test_a_run_of_all_weights_ends_though_its_start_is_gone(tmp_path, monkeypatch, capsys):
    start = make_pretrained(tmp_path / "start")
    lose_the_start(monkeypatch, lambda: shutil.rmtree(start))
    end = grpo(tmp_path / "run", start, lora=0, beta=0.0)
    assert end.name == "step-2" and "is gone" in capsys.readouterr().err
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert metrics["checkpoints"] == [str(end)] and "pass@1" in metrics["overall"]


# ------------------------------------------------------------------------------------------------
# Links


def with_links(folder: Path, store: Path) -> Path:
    """Move a checkpoint's files away, as a hub's cache keeps them, and link to them."""
    store.mkdir()
    for i, file in enumerate(file for file in folder.rglob("*") if file.is_file()):
        file.rename(store / str(i))
        file.symlink_to(os.path.relpath(store / str(i), file.parent))
    return folder


def test_a_checkpoint_of_links_is_read_and_its_files_are_checked(tmp_path, capsys):
    folder = save_tiny(tmp_path / "run", 3)
    expected = load_model(folder)[0]
    with_links(folder, tmp_path / "store")
    assert same_weights(load_model(find_checkpoint(str(folder)))[0], expected)
    assert find_checkpoint(str(tmp_path / "run")) == folder
    weights = (folder / "model.safetensors").resolve()
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "not as it was written" in refusal(lambda: find_checkpoint(str(folder)), capsys)
    weights.unlink()
    assert "is missing" in refusal(lambda: find_checkpoint(str(folder)), capsys)


def test_shards_may_be_links(tmp_path):
    folder = make_pretrained(tmp_path / "model", shard_size="20KB")
    expected = load_model(folder)[0]
    assert same_weights(load_model(with_links(folder, tmp_path / "blobs"))[0], expected)


def test_a_run_whose_folders_are_links_goes_on_and_deletes_links_alone(tmp_path):
    """As if ckpt/ and old checkpoints had been moved to another disk."""
    disk, run = tmp_path / "disk", tmp_path / "run"
    (disk / "run").mkdir(parents=True)
    run.symlink_to(disk / "run")
    sft(run, field=3, updates=1, examples=0)
    (run / "step-1").rename(disk / "kept")
    (run / "step-1").symlink_to(disk / "kept")
    assert newest_checkpoint(run) == run / "step-1"
    save_tiny(run, 2, keep=1)
    assert [p.name for p in checkpoints(run)] == ["step-2"] and verify_manifest(
        disk / "kept"
    ) is None


def refuse(monkeypatch, call: str, which=lambda where: True) -> None:
    real = getattr(os, call)

    def refusing(where, *args, **kwargs):
        if which(where):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(where, *args, **kwargs)

    monkeypatch.setattr(os, call, refusing)


def test_a_folder_that_cannot_be_synced_is_no_error_but_a_file_is(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        refuse(patch, "fsync", lambda file: stat.S_ISDIR(os.fstat(file).st_mode))
        assert verify_manifest(save_tiny(tmp_path, 1)) is None
    refuse(monkeypatch, "fsync")
    assert "Invalid argument" in refusal(lambda: save_tiny(tmp_path, 2), capsys)


def test_a_file_system_without_modes_takes_checkpoints(tmp_path, monkeypatch):
    refuse(monkeypatch, "chmod")
    assert verify_manifest(save_tiny(tmp_path, 1)) is None


def test_runs_of_pretrained_models_save_memory(tmp_path, pretrained, monkeypatch):
    """The tiny model's are faster without. oneDNN reads its limit at the first product."""
    called: list[str] = []
    choose = training.checkpoint.choose_dtype

    def choose_dtype(*args):
        called.append("choose_dtype")
        return choose(*args)

    monkeypatch.setattr(training.checkpoint, "choose_dtype", choose_dtype)
    monkeypatch.setattr(training, "save_memory", lambda: called.append("save_memory"))
    sft(tmp_path / "tiny", examples=0)
    assert called == ["choose_dtype"]
    sft(tmp_path / "pretrained", model=str(pretrained), lora=2)
    assert called[1:] == ["save_memory", "choose_dtype"]


# ------------------------------------------------------------------------------------------------
# Terminals, pipes and signals


def test_a_pipe_that_closes_costs_no_file(tmp_path):
    """As `eval.py ... | head`: the files are there, and nothing is said.

    Nor does a backend matter that matplotlib does not know: it would end its import.
    """
    save_tiny(tmp_path / "run", 1, field=11)
    command = f"{sys.executable} {ROOT}/eval.py run --problems 4 --json a.json --plot a.png"
    script = f"{command} | true; exit ${{PIPESTATUS[0]}}"
    options = {"env": os.environ | {"MPLBACKEND": "nonsense"}, "cwd": tmp_path}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, **options)
    assert done.stderr == "" and done.returncode == 128 + signal.SIGPIPE
    assert json.loads((tmp_path / "a.json").read_text()) and (tmp_path / "a.png").stat().st_size


def test_training_goes_on_where_nobody_reads_its_bar(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stderr", Closed())
    assert sft(tmp_path / "run", examples=0, updates=4).name == "step-4"
    assert len(read_log(tmp_path / "run" / "metrics.jsonl")) == 4


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("updates", [9, 1])
def test_a_closed_terminal_saves_as_a_kill_does(number, updates, tmp_path, monkeypatch, capsys):
    """In the last update, too: the main job's SFT must not go on to GRPO."""
    real = training.optimizer_step

    def interrupted(run, *args, **kwargs):
        signal.raise_signal(number)
        return real(run, *args, **kwargs)

    monkeypatch.setattr(training, "optimizer_step", interrupted)
    with pytest.raises(SystemExit) as stop:
        sft(tmp_path / "run", examples=0, updates=updates, save_every=9)
    assert stop.value.code == 128 + number and "stopped and saved" in capsys.readouterr().err
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-1"]


def test_a_signal_during_the_last_save_stops_before_what_follows(tmp_path, monkeypatch, capsys):
    real = run_dir.save_checkpoint

    def save(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(run_dir, "save_checkpoint", save)
    with pytest.raises(SystemExit) as stop:
        sft(tmp_path / "run", examples=0, updates=1)
    assert stop.value.code == 128 + signal.SIGTERM
    assert "stopped and saved" in capsys.readouterr().err
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["step-1"]


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = Signals()
        for _ in signals.during(training.ProgressBar(range(2), disable=True)):
            signal.raise_signal(signal.SIGHUP)
        assert not signals.caught and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------
# Refused before any work


def dangling(run: Path) -> None:
    run.symlink_to("nowhere/at/all")


def looping_log(run: Path) -> None:
    run.mkdir()
    (run / "metrics.jsonl").symlink_to("metrics.jsonl")


@pytest.mark.parametrize("spoil", [dangling, looping_log])
def test_a_run_folder_that_cannot_be_written_is_refused_at_once(spoil, tmp_path, capsys):
    spoil(tmp_path / "run")
    refusal(lambda: sft(tmp_path / "run", examples=0), capsys)
    refusal(lambda: grpo(tmp_path / "run", save_tiny(tmp_path / "start", 1, field=3)), capsys)
    assert not list(tmp_path.glob("run/step-*"))


def test_a_manifest_that_dangles_is_a_broken_checkpoint(tmp_path, capsys):
    folder = save_tiny(tmp_path, 1)
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("nowhere")
    assert "broken" in refusal(lambda: find_checkpoint(str(folder)), capsys)


@pytest.mark.parametrize("name", ["generation_config.json", "chat_template.jinja"])
def test_a_file_of_the_tokenizer_that_dangles_is_refused(name, pretrained, capsys):
    (pretrained / name).unlink()
    (pretrained / name).symlink_to("nowhere")
    assert name in refusal(lambda: load_tokenizer(pretrained), capsys)


def test_a_newest_step_that_leads_nowhere_is_passed_over(tmp_path, capsys):
    folder = save_tiny(tmp_path / "ckpt" / "run", 1, field=11)
    (tmp_path / "ckpt" / "run" / "step-9").symlink_to("/nowhere")
    assert choose_checkpoints([str(tmp_path / "ckpt")]) == [folder]
    assert "step-9 is broken" in capsys.readouterr().err


def test_a_start_whose_name_means_another_model_meanwhile_is_not_taken_for_it(
    pretrained, tmp_path, monkeypatch
):
    """models/current was a link to one model, and is one to another when the run ends."""
    link, other = tmp_path / "current", make_pretrained(tmp_path / "other", "qwen3")
    link.symlink_to(pretrained)
    loaded = []
    real = training.checkpoint.load_model

    def load(folder, *args, **kwargs):
        loaded.append(folder.resolve())
        return real(folder, *args, **kwargs)

    def switch():
        link.unlink()
        link.symlink_to(other)

    lose_the_start(monkeypatch, switch)
    monkeypatch.setattr(training.checkpoint, "load_model", load)
    grpo(tmp_path / "run", link, lora=0, beta=0.0)
    assert loaded[-1] == pretrained.resolve()


def test_a_moved_start_under_the_name_it_had_is_found(moved, tmp_path):
    """The run alone went to another depth; --init is what it was, and means the same weights."""
    Path("deep/er").mkdir(parents=True)
    Path("ckpt/rl").rename("deep/er/rl")
    shutil.rmtree("deep/er/rl/step-2")
    assert grpo("deep/er/rl", "ckpt/sft", lora=2, resume=True).name == "step-2"


def test_a_start_of_other_sizes_under_the_same_weights_is_refused(pretrained, tmp_path, capsys):
    sft(tmp_path / "run", model=str(pretrained), lora=2)
    shutil.rmtree(tmp_path / "run" / "step-2")
    config = json.loads((pretrained / "config.json").read_text())
    (pretrained / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    line = refusal(
        lambda: sft(tmp_path / "run", model=str(pretrained), lora=2, resume=True), capsys
    )
    assert "config.json is not the one" in line


def test_handlers_are_put_back():
    """Ctrl-C ends the evaluation after the last update."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for _ in Signals().during(training.ProgressBar(range(2), disable=True)):
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
