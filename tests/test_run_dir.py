"""Run folders: atomic checkpoints, damage that is detected, exact resume, one writer at a time."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import refusal, same_weights, small_model, word_tokenizer

import train_sft
from lib.checkpoint import checkpoints, find_checkpoint, load_model, newest_checkpoint
from lib.distributed import World
from lib.files import verify_manifest
from lib.run_dir import JsonLines, Log, changed_flags, open_run, read_log, save_checkpoint
from train_grpo import GrpoConfig
from train_sft import SftConfig

ONE = World(0, 1, torch.device("cpu"))
HERE = Path(train_sft.__file__).parent
SHORT = {
    "field": 3,
    "steps": "1-2",
    "updates": 6,
    "batch_size": 4,
    "warmup": 0,
    "save_every": 2,
    "precision": "fp32",
}


def sft(out: Path, **flags) -> Path:
    return train_sft.main(train_sft.SftConfig(out=str(out), **(SHORT | flags)), ONE)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of six updates with checkpoints at 2, 4 and 6."""
    run = tmp_path_factory.mktemp("finished") / "run"
    sft(run)
    return run


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def without_times(rows: list[dict]) -> list[dict]:
    """Leave out what another run cannot repeat: speeds, and the most memory so far."""
    varies = ("per_second", "peak_memory_gb")
    return [{k: x for k, x in row.items() if not any(y in k for y in varies)} for row in rows]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "training_state.pt", "training.json", "config.json"]
)
def test_a_damaged_checkpoint_is_passed_over_and_its_updates_are_done_again(
    how, name, run, finished, capsys
):
    DAMAGE[how](run / "step-6" / name)
    assert newest_checkpoint(run) == run / "step-4"
    line = capsys.readouterr().err
    assert "step-6 is broken" in line and name in line and len(line.splitlines()) == 1
    assert "broken" in refusal(lambda: find_checkpoint(str(run / "step-6")), capsys), (
        "named directly, it is refused"
    )
    if name == "model.safetensors":
        sft(run, resume=True)
        assert same_weights(*(load_model(folder / "step-6")[0] for folder in (run, finished)))
        logs = [without_times(read_log(folder / "metrics.jsonl")) for folder in (run, finished)]
        assert logs[0] == logs[1] and verify_manifest(run / "step-6") is None


def test_a_run_without_a_whole_checkpoint_is_refused(run, capsys):
    for folder in checkpoints(run):
        flip(folder / "model.safetensors")
    assert "step-6 is broken" in refusal(lambda: find_checkpoint(str(run)), capsys)
    assert "holds a run already" in refusal(lambda: sft(run), capsys), (
        "a new run does not overwrite it"
    )


@pytest.mark.parametrize("content", ["{", "[]", '{"config.json": 5}'])
def test_a_manifest_that_lies_is_a_damaged_checkpoint(content, run):
    (run / "step-6" / "manifest.json").write_text(content)
    assert newest_checkpoint(run) == run / "step-4"


def test_every_file_of_a_checkpoint_is_in_its_manifest(run):
    files = {file.name for file in (run / "step-6").iterdir()} - {"manifest.json"}
    assert set(json.loads((run / "step-6" / "manifest.json").read_text())) == files


def test_drafts_of_a_killed_run_are_cleared_away(run):
    shutil.rmtree(run / "step-6")
    (run / ".step-5.part").mkdir()
    sft(run, resume=True)
    assert not list(run.glob(".step*")) and (run / "step-6").is_dir()


def test_a_log_cut_short_is_repaired(tmp_path):
    (tmp_path / "step-2").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"update": 1}\n{"update": 2}\n{"update": 3}\n{"upd')
    log = Log(tmp_path, 2)
    log.write({"update": 3, "loss": float("nan")})
    expected = [{"update": 1}, {"update": 2}, {"update": 3, "loss": None}]
    assert read_log(tmp_path / "metrics.jsonl") == expected == log.rows


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"update": 1}\n{"upd\n{"update": 3}\n', "line 2"),
        ('{"update": 1}\n\n{"update": 3}\n', "lacks update 2"),
        ('{"update": 1}\n[2]\n', "line 2"),
        ('{"update": 1}\n\xff\xfe\n', "line 2"),
        ('{"update": 1}\n{"update": 3}\n', "lacks update 2"),
        ('{"update": 1}\n', "lacks update 2"),
        ("", "lacks update 1"),
    ],
)
def test_a_log_that_does_not_reach_the_checkpoint_is_refused(text, says, tmp_path, capsys):
    """A run does not go on with rows missing from its log."""
    (tmp_path / "step-2").mkdir()
    (tmp_path / "metrics.jsonl").write_bytes(text.encode("latin-1"))
    line = refusal(lambda: Log(tmp_path, 2), capsys)
    assert says in line and str(tmp_path / "metrics.jsonl") in line
    assert (tmp_path / "metrics.jsonl").read_bytes() == text.encode("latin-1")


def test_blank_lines_of_a_log_cost_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"update": 1}\n\n{"update": 2}\n{"update": 3}\n{"update": 4}\n')
    assert [row["update"] for row in JsonLines(path).rewind(3)] == [1, 2, 3]
    assert [row["update"] for row in read_log(path)] == [1, 2, 3]


def test_one_process_writes_to_a_run(run, finished, capsys):
    log = Log(run, 6)
    assert "another process is writing" in refusal(lambda: sft(run, resume=True), capsys)
    del log
    assert sft(run, resume=True) == run / "step-6"
    assert read_log(run / "metrics.jsonl") == read_log(finished / "metrics.jsonl")


def test_a_file_system_without_locks_gives_a_warning(run, monkeypatch, capsys):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unsupported)
    Log(run, 6).write({"update": 7})
    assert "no locks" in capsys.readouterr().err and len(read_log(run / "metrics.jsonl")) == 7


def test_a_start_that_has_changed_is_noticed(tmp_path, pretrained, capsys):
    flags = {
        "model": str(pretrained),
        "updates": 2,
        "lora": 2,
        "examples": 8,
        "save_every": 1,
        "batch_size": 2,
    }
    run = tmp_path / "lora"
    sft(run, **flags)
    shutil.rmtree(run / "step-2")
    flip(pretrained / "model.safetensors")
    assert "say by --model where they are" in refusal(
        lambda: sft(run, resume=True, **flags), capsys
    )
    shutil.rmtree(pretrained)
    assert "there is no folder" in refusal(lambda: sft(run, resume=True, **flags), capsys)


def test_damaged_checkpoints_do_not_push_out_sound_ones(run, monkeypatch):
    """With --keep 1: a run resumes from 4, since 6 is damaged, and is stopped at 5."""
    flip(run / "step-6" / "model.safetensors")
    monkeypatch.setattr("lib.training.ProgressBar", Interrupted(5))
    with pytest.raises(SystemExit):
        sft(run, resume=True, keep=1)
    assert [p.name for p in checkpoints(run)] == ["step-5"] and newest_checkpoint(
        run
    ) == run / "step-5"


@pytest.mark.parametrize(
    "what", ["a log that was replaced", "a log that is gone", "a newer checkpoint"]
)
def test_a_log_that_another_process_changed_is_refused(what, run, capsys):
    (run / "metrics.jsonl").rename(run / "other")
    if what == "a log that is gone":
        assert (
            "gone" in refusal(lambda: Log(run, 6), capsys) and not (run / "metrics.jsonl").exists()
        )
        return
    shutil.copy(run / "other", run / "metrics.jsonl")
    if what == "a newer checkpoint":
        assert "just written" in refusal(lambda: Log(run, 4), capsys)
        return
    log = Log(run, 6)
    shutil.copy(run / "other", run / "copy")
    (run / "copy").rename(run / "metrics.jsonl")
    assert "no longer the file" in refusal(lambda: log.write({"update": 7}), capsys)


def test_processes_have_to_see_the_same_checkpoint(run, capsys, monkeypatch):
    two = World(0, 2, torch.device("cpu"))
    monkeypatch.setattr(World, "all_gather", lambda self, rows: [*rows, 4])
    config = train_sft.fill_defaults(train_sft.SftConfig(out=str(run), resume=True, **SHORT), True)
    line = refusal(lambda: open_run(run, run / "step-6", config, "sft", two), capsys)
    assert "different checkpoints" in line


def flags_of(config: dict) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in config.items()]


def start_sft(out: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, str(HERE / "train_sft.py"), f"--out={out}"]
    command += [*flags_of(SHORT | {"updates": 5000}), *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_that_also_ends_the_reader_of_a_pipe_saves(tmp_path):
    """As with `python train_sft.py 2>&1 | tee log`: the run is saved all the same."""
    process = start_sft(tmp_path / "run", "--save-every=10000")
    log = tmp_path / "run" / "metrics.jsonl"
    while not log.exists() or log.stat().st_size < 1000:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.stdout.close(), process.stderr.close()
    process.wait(timeout=60)
    assert len(checkpoints(tmp_path / "run")) == 1


def test_a_signal_saves_and_stops(tmp_path, monkeypatch, capsys):
    """And a resumed run goes on as if it had not been stopped."""
    process = start_sft(tmp_path / "stopped", "--save-every=10000")
    log = tmp_path / "stopped" / "metrics.jsonl"
    while not log.exists() or log.stat().st_size < 1000:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM and "stopped and saved" in err
    (folder,) = checkpoints(tmp_path / "stopped")
    done = int(folder.name[5:])
    assert [row["update"] for row in read_log(log)] == list(range(1, done + 1))

    # Stop again shortly after, so that the test does not run all updates.
    for name in ("stopped", "straight"):
        rest = Interrupted(done + 3)
        monkeypatch.setattr("lib.training.ProgressBar", rest)
        with pytest.raises(SystemExit) as stop:
            sft(tmp_path / name, resume=name == "stopped", updates=5000, save_every=10000)
        assert stop.value.code == 128 + signal.SIGTERM
    runs = [tmp_path / name for name in ("stopped", "straight")]
    assert same_weights(*(load_model(run / f"step-{done + 3}")[0] for run in runs))
    logs = [without_times(read_log(run / "metrics.jsonl")) for run in runs]
    assert logs[0] == logs[1]


class Interrupted:
    """A progress bar that lets this process catch a SIGTERM in the update before `end`."""

    def __init__(self, end: int):
        self.end, self.format_dict = end, {"elapsed": 0.0}

    def __call__(self, updates, **_):
        self.updates = updates
        return self

    def __iter__(self):
        for update in self.updates:
            if update + 1 == self.end:
                signal.raise_signal(signal.SIGTERM)
            yield update

    def set_postfix(self, *_):
        pass


def test_where_a_checkpoint_cannot_be_written_none_is_lost(run, capsys):
    shutil.rmtree(run / "step-6")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # files of at most 1 MB
    try:
        with pytest.raises(SystemExit) as stop:
            sft(run, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "cannot write the checkpoint" in line]
    assert stop.value.code == 2 and "is the disk full?" in line, err
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "step-2", "step-4"]
    assert verify_manifest(run / "step-4") is None


WRITERS = [
    "lib.checkpoint.save_file",
    "torch.save",
    "lib.checkpoint.write_json",
    "lib.files.sha256",
    "lib.files.fsync",
]


@pytest.mark.parametrize(
    "writer", [*WRITERS, "transformers.PreTrainedTokenizerFast.save_pretrained"]
)
def test_a_full_disk_is_a_one_line_error_in_every_writer(writer, run, monkeypatch, capsys):
    def full(*_, **__):
        raise Exception("No space left on device")  # as `tokenizers` does

    monkeypatch.setattr(writer, full)
    model, tokenizer = small_model(), word_tokenizer(11)
    optimizer = torch.optim.AdamW(model.parameters())
    saved = (run, 9, model, tokenizer, optimizer, {})
    line = refusal(lambda: save_checkpoint(*saved).result(), capsys)
    assert "cannot write the checkpoint" in line and "No space left" in line
    assert sorted(p.name for p in run.iterdir()) == ["metrics.jsonl", "step-2", "step-4", "step-6"]


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot write to" in refusal(lambda: sft(tmp_path / "file" / "run"), capsys)


def test_old_checkpoints_make_room(tmp_path):
    """They go only once the new one is written, and other folders stay."""
    model, tokenizer, run = small_model(), word_tokenizer(11), tmp_path / "run"
    optimizer = torch.optim.AdamW(model.parameters())
    (run / "step-notes").mkdir(parents=True)
    for update in (9, 10, 11):
        save_checkpoint(run, update, model, tokenizer, optimizer, {"keep": 2}).result()
    assert sorted(p.name for p in run.iterdir()) == ["step-10", "step-11", "step-notes"]
    save_checkpoint(run, 12, model, tokenizer, optimizer, {"keep": 0}).result()
    assert len(list(run.iterdir())) == 4


def test_a_finished_runs_log_is_kept_though_its_checkpoints_are_gone(tmp_path, capsys):
    """Bugs: the same command without --resume emptied it, and so did SFT's."""
    (tmp_path / "evaluation.json").write_text("{}")
    for stage in ("grpo", "sft"):
        line = refusal(
            lambda stage=stage: open_run(tmp_path, None, GrpoConfig(), stage, ONE), capsys
        )
        assert "holds a run already" in line


@pytest.mark.parametrize("flag", ["tagger", "reward"])
def test_a_run_resumes_with_a_changed_tagger_and_not_with_a_changed_reward(flag, tmp_path, capsys):
    """Labels change neither weights nor samples."""
    folder, functions = tmp_path / "step-3", tmp_path / "own.py"
    folder.mkdir()
    functions.write_text("1")
    config = GrpoConfig(resume=True, lora=0, **{flag: f"{functions}:f"})
    meta = asdict(config) | {"stage": "grpo", "update": 3, "inputs": {f"--{flag}": "other"}}
    (folder / "training.json").write_text(json.dumps(meta))
    resume = partial(open_run, tmp_path, folder, config, "grpo", ONE)
    if flag == "reward":
        line = refusal(resume, capsys)
    else:
        assert resume() == (3, None)
        line = capsys.readouterr().err
    assert f"the file of --{flag} has changed" in line


def test_only_these_flags_may_differ_on_resume():
    free = {"out", "resume", "eval_every", "eval_problems", "save_every", "keep"}
    free |= {"gradient_checkpointing", "fsdp"}
    newer = changed_flags({"lr": 1e-3}, GrpoConfig(lr=1e-3, beta=None, refills=5))
    assert newer == [("--refills", 0, 5)], "it had its default"
    for config in (GrpoConfig(), SftConfig()):
        changed = changed_flags(dict.fromkeys(asdict(config), "other"), config)
        found = {flag[2:].replace("-", "_") for flag, *_ in changed}
        assert found == asdict(config).keys() - free
