"""Runs on disk: RUN/step-N, checkpoints from which a run goes on as if it had not stopped, and RUN/metrics.jsonl.

A checkpoint is a Hugging Face folder. Beside the model lie `training.json` (what made it), `training_state.pt` (the
optimizer; all random streams are made from the update's number) and `manifest.json` (the SHA-256 of every file); with
LoRA the model has its adapters merged, and `adapter/` holds them by themselves. A folder is written under another name
and renamed when complete, so a checkpoint that was interrupted does not exist; one that was damaged later is known by
its manifest and passed over. A run is written by one process at a time, which holds a lock on its log. Nothing loaded
here can run code.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from checkpoint import find_weights, hf_config, load_training, weights_to_save
from lora import save_adapters
from model import Transformer
from runtime import World, fail, is_sharded, refusals, require, warn, whole, write_json
from sharding import split_like
from tokenizer import Tokenizer

# Flags that may be others when a run goes on.
MAY_DIFFER = {"out", "resume", "eval_every", "eval_problems", "save_every", "keep", "recompute", "shard"}
LOG, MANIFEST = "metrics.jsonl", "manifest.json"


def open_run(run: Path, source: Path | None, config, stage: str, world: World) -> int:
    """How many updates are done: none in a new run, or those of the checkpoint `source` that the run goes on from.

    Refuses to start where a run already lies, where another process writes or nothing can be written, and to go on
    with other flags or from another start.
    """
    with refusals():
        there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
        require(there.is_dir() and os.access(there, os.W_OK | os.X_OK), f"cannot write to {there}")
        if world.leads and (run / LOG).exists():
            with (run / LOG).open("a") as file:
                lock(file, run)
    done = 0
    if config.resume:
        require(source is not None, f"{run} holds no checkpoint to resume")
        done = check_resumed(run, source, config, stage)
    else:
        require(not checkpoints(run), f"{run} holds a run already: --resume continues it, --out names another place")
    require(len(set(world.gather([done]))) == 1, f"the processes see different checkpoints in {run}")
    return done


def check_resumed(run: Path, source: Path, config, stage: str) -> int:
    """Refuse flags and a start that are not those of the run; how many updates are done."""
    training = load_training(source)
    require(training.get("stage") == stage, f"{source} is no checkpoint of this script")
    for flag, then, now in other_flags(training, config):
        fail(f"{run} was started with {flag} {then}, not {now or 'without'}")
    check_start(run, training)
    return training["update"]


def check_start(run: Path, training: dict) -> None:
    """Refuse a run whose start is no longer what it was."""
    if start := training.get("start"):
        require(Path(start).is_dir(), f"{start}, where {run} started, is gone")
        same = fingerprint(Path(start)) == training.get("start_sha256")
        require(same, f"the weights in {start}, where {run} started, are no longer the same")


def other_flags(training: dict, config) -> list[tuple[str, object, object]]:
    """The flags in which a config is not what made a checkpoint, with the values then and now."""
    names = [name for name in asdict(config) if name not in MAY_DIFFER and name in training]
    values = [(f"--{name.replace('_', '-')}", training[name], getattr(config, name)) for name in names]
    return [(flag, then, now) for flag, then, now in values if then != now]


def fingerprint(folder: Path) -> str:
    """The SHA-256 of a model's weights on disk."""
    files = sorted(set(find_weights(folder).values()))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------------------------
# Checkpoints


def save_checkpoint(
    run: Path,
    update: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    training: dict,
    leads: bool = True,
) -> Path:
    """Write RUN/step-UPDATE whole or not at all; `training` says what made it, as JSON.

    One process `leads` and writes; the others are needed where the model is sharded. Of the run's checkpoints the
    newest training["keep"] stay, or all where that is 0.
    """
    folder, draft = run / f"step-{update}", run / f".step-{update}.part"
    if not leads and not is_sharded(model):
        return folder
    weights, state = weights_to_save(model, training, leads), optimizer_to_save(optimizer, leads)
    if not leads:
        return folder
    for old in run.glob(".step-*.part"):  # of a run that was killed while it wrote
        shutil.rmtree(old, ignore_errors=True)
    try:
        _write_checkpoint(draft, weights, state, model, tokenizer, {"update": update, **training})
        for path in (*draft.rglob("*"), draft, run / LOG):
            sync(path)
        for old in checkpoints(run):  # damaged ones, which were passed over
            if number(old) >= update:
                remove(old)
        os.replace(draft, folder)
        sync(run)
    except Exception as error:  # a full disk, mostly, of which every library has its own kind
        fail(f"cannot write the checkpoint {folder} ({shutil.disk_usage(run).free / 1e6:.0f} MB are free): {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if keep := training.get("keep", 0):
        for old in checkpoints(run)[:-keep]:
            remove(old)
    return folder


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk and not only on their way there."""
    if path.exists():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that it is never half there under its name."""
    old = checkpoint.with_name(f".{checkpoint.name}.old.part")
    os.replace(checkpoint, old)
    shutil.rmtree(old, ignore_errors=True)


def _write_checkpoint(
    draft: Path, weights: dict, state: dict, model: Transformer, tokenizer: Tokenizer, training: dict
) -> None:
    draft.mkdir(parents=True)
    save_file(weights, draft / "model.safetensors", {"format": "pt"})
    tokenizer.inner.save_pretrained(draft)
    write_json(draft / "config.json", hf_config(model.config, tokenizer))
    stops = {"eos_token_id": tokenizer.stops, "pad_token_id": tokenizer.inner.pad_token_id}
    write_json(draft / "generation_config.json", stops)
    write_json(draft / "training.json", training)
    torch.save(state, draft / "training_state.pt")
    if training.get("lora"):
        save_adapters(model, training["start"], draft / "adapter")
    files = sorted(file for file in draft.rglob("*") if file.is_file())
    write_json(draft / MANIFEST, {str(file.relative_to(draft)): sha256(file) for file in files})


def fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint by its manifest, if it has one; None where all is as it was written."""
    if not (checkpoint / MANIFEST).exists():  # not made here
        return None
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())
        for name, digest in hashes.items():
            if not (checkpoint / name).resolve().is_relative_to(checkpoint.resolve()):
                return f"{MANIFEST} names {name}, which lies elsewhere"
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"cannot read {MANIFEST}: {error}"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The folders RUN/step-N, by N."""
    return sorted((p for p in run.glob("step-*") if re.fullmatch(r"step-[0-9]+", p.name)), key=number)


def number(checkpoint: Path) -> int:
    """N of RUN/step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run: Path) -> Path | None:
    """RUN/step-N with the largest N that is whole; None where there is none at all. Refuses if none is whole."""
    faults = {}
    for folder in reversed(checkpoints(run)):
        if not (found := fault(folder)):
            for broken, why in faults.items():
                warn(f"{broken} is broken and passed over: {why}")
            return folder
        faults[folder] = found
    for broken, why in faults.items():  # the newest
        fail(f"{broken} is broken, and no other is there: {why}")
    return None


def find_checkpoint(name: str) -> Path:
    """A checkpoint folder, the newest checkpoint of a run folder, or a model from the Hugging Face hub or its cache."""
    path = Path(name)
    with refusals():  # names that no file system takes
        path.exists()
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not path.exists() and path.parts[0] not in ("runs", "models"):
        try:
            return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"]))
        except Exception as error:  # no such model, no permission, no network: dozens of kinds
            fail(f"there is no folder {name}, nor can the hub be asked for that model: {str(error)[:300]}")
    if (path / "config.json").exists() or (path / MANIFEST).exists():
        require(not (found := fault(path)), f"{path} is broken: {found}")
        return path
    require(path.is_dir(), f"there is no folder {path}")
    found = newest_checkpoint(path)
    require(found is not None, f"{path} holds no checkpoint: neither config.json nor step-N folders")
    return found


def optimizer_to_save(optimizer: torch.optim.Optimizer, leads: bool) -> dict:
    """The optimizer's state, as it is without sharding; empty but for the process that leads."""
    state, gathered = optimizer.state_dict(), {}
    for i, of_weight in state["state"].items():
        gathered[i] = {}
        for key, value in of_weight.items():
            value = whole(value)
            if leads:
                gathered[i][key] = value.cpu()
    return state | {"state": gathered}


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    try:
        state = torch.load(checkpoint / "training_state.pt", weights_only=True, map_location="cpu", mmap=True)
        for i, weight in enumerate(w for group in optimizer.param_groups for w in group["params"]):
            of_weight = state["state"].get(i, {})
            state["state"][i] = {key: split_like(value, weight) for key, value in of_weight.items()}
        optimizer.load_state_dict(state)
    except Exception as error:  # a cut file fails in many ways
        fail(f"cannot read the optimizer in {checkpoint / 'training_state.pt'}: {str(error)[:200]}")


# ------------------------------------------------------------------------------------------------------------------
# The log


def lock(file, run: Path) -> None:
    """Hold the log of a run, until it is closed or this process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {run}")
    except OSError as error:
        warn(f"this file system has no locks ({error}): see to it that nothing else writes to {run}")


class Log:
    """RUN/metrics.jsonl, a row an update, which nobody else can write as long as this object lives.

    What lies behind row `done`, where the run goes on, is cut off.
    """

    def __init__(self, run: Path, done: int):
        self.path = run / LOG
        require(self.path.exists() or not done, f"{self.path} is gone, though step-{done} is there")
        with refusals():
            run.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab", buffering=0)
        lock(self.file, run)
        newer = [found for found in checkpoints(run) if number(found) > done and not fault(found)]
        require(not newer, f"another process has just written to {run}")
        self.rows = read_log(self.path)[:done]
        there = [row.get("update") for row in self.rows]
        missing = next((n for n, found in enumerate([*there, *[None] * done][:done], 1) if n != found), None)
        require(missing is None, f"{self.path} lacks update {missing}, though step-{done} is there")
        with self.path.open("rb") as file:
            self.file.truncate(sum(len(file.readline()) for _ in range(done)))

    def write(self, row: dict) -> None:
        row = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
        self.rows.append(row)
        line = json.dumps(row).encode() + b"\n"
        with refusals():
            same = os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
            require(same, f"{self.path} is no longer the file that this run writes to")
            written = self.file.write(line)
        require(written == len(line), f"{self.path} could not be written: the disk is full")


def read_log(path: Path) -> list[dict]:
    """The rows of a log; a last line that a crash cut short, without its end, is left out."""
    with refusals():
        lines = path.read_bytes().decode(errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            rows.append(json.loads(line))
            sound = isinstance(rows[-1], dict)
        except (ValueError, RecursionError):
            sound = False
        require(sound, f"{path}, line {number}: this is no JSON object")
    return rows
