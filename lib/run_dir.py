"""Runs on disk: RUN/step-N, from which a run resumes exactly, and RUN/metrics.jsonl.

A checkpoint is a Hugging Face folder. Beside the model lie `training.json` (what made it),
`training_state.pt` (the optimizer; random streams are regenerated from the update's number) and
`manifest.json` (the SHA-256 of every file). With LoRA the model has its adapters merged, and
`adapter/` holds them alone.

A checkpoint is renamed when complete, so a crash never leaves half of one; one that is damaged
later is detected by its manifest and passed over. One process at a time writes to a run: it holds a
lock on the log. Nothing loaded here can run code.
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

from lib.checkpoint import find_weights, hf_config, load_meta, weights_to_save
from lib.distributed import World, full_tensor, is_fsdp
from lib.flags import fail, flag_name, require, user_errors, warn, write_json
from lib.fsdp import shard_like
from lib.lora import save_adapters
from lib.tokenizer import Tokenizer
from lib.transformer import Transformer

MAY_DIFFER = {"out", "resume", "eval_every", "eval_problems", "save_every", "keep"}
MAY_DIFFER |= {"gradient_checkpointing", "fsdp"}  # flags that may change when a run is resumed
LOG, MANIFEST = "metrics.jsonl", "manifest.json"


def open_run(run: Path, resume_from: Path | None, config, stage: str, world: World) -> int:
    """Return how many updates are done: 0 in a new run, or those of the checkpoint `resume_from`.

    Refuses a new run where one already lies, a folder that another process writes to or that
    cannot be written, and resuming with other flags or from another start.
    """
    with user_errors():
        existing = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
        writable = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        require(writable, f"cannot write to {existing}")
        if world.is_master and (run / LOG).exists():
            with (run / LOG).open("a") as file:
                lock(file, run)
    done = 0
    if config.resume:
        require(resume_from is not None, f"{run} holds no checkpoint to resume")
        meta = load_meta(resume_from)
        require(meta.get("stage") == stage, f"{resume_from} is no checkpoint of this script")
        for flag, then, now in changed_flags(meta, config):
            fail(f"{run} was started with {flag} {then}, not {now or 'without'}")
        check_start(run, meta)
        done = meta["update"]
    else:
        message = f"{run} holds a run already: --resume continues it, --out names another folder"
        require(not checkpoints(run), message)
    same = len(set(world.all_gather([done]))) == 1
    require(same, f"the processes see different checkpoints in {run}")
    return done


def check_start(run: Path, meta: dict) -> None:
    """Refuse a run whose start has changed or is gone."""
    if start := meta.get("init_from"):
        require(Path(start).is_dir(), f"{start}, where {run} started, is gone")
        same = weights_sha256(Path(start)) == meta.get("init_sha256")
        require(same, f"the weights in {start}, where {run} started, are no longer the same")


def changed_flags(meta: dict, config) -> list[tuple[str, object, object]]:
    """Return the flags in which a config differs from a checkpoint's, with both values."""
    flags = {name: now for name, now in asdict(config).items() if name not in MAY_DIFFER}
    changed = [name for name, now in flags.items() if meta.get(name, now) != now]
    return [(flag_name(name), meta[name], flags[name]) for name in changed]


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model's weights on disk."""
    files = sorted(set(find_weights(folder).values()))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------
# Writing checkpoints


def save_checkpoint(
    run: Path,
    update: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer,
    meta: dict,
    is_master: bool = True,
) -> Path:
    """Write RUN/step-UPDATE, whole or not at all. `meta` says as JSON what made it.

    Rank 0 writes; the other ranks are needed if the model is sharded. The run's newest
    meta["keep"] checkpoints are kept, or all if that is 0.
    """
    folder, draft = run / f"step-{update}", run / f".step-{update}.part"
    if not is_master and not is_fsdp(model):
        return folder
    weights, state = weights_to_save(model, meta, is_master), full_state(optimizer, is_master)
    if not is_master:
        return folder
    for old in run.glob(".step-*.part"):  # left by a run that was killed while it wrote
        shutil.rmtree(old, ignore_errors=True)
    try:
        draft.mkdir(parents=True)
        save_file(weights, draft / "model.safetensors", {"format": "pt"})
        tokenizer.inner.save_pretrained(draft)
        stops = {"eos_token_id": tokenizer.stops, "pad_token_id": tokenizer.inner.pad_token_id}
        write_json(draft / "config.json", hf_config(model.config, tokenizer))
        write_json(draft / "generation_config.json", stops)
        write_json(draft / "training.json", {"update": update, **meta})
        torch.save(state, draft / "training_state.pt")
        if meta.get("lora"):
            save_adapters(model, meta["init_from"], draft / "adapter")
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        hashes = {str(file.relative_to(draft)): sha256(file) for file in files}
        write_json(draft / MANIFEST, hashes)
        for path in (*draft.rglob("*"), draft, run / LOG):
            fsync(path)
        for old in checkpoints(run):  # damaged ones, which were passed over
            if number(old) >= update:
                remove(old)
        os.replace(draft, folder)
        fsync(run)
    except Exception as error:  # mostly a full disk, for which each library raises its own kind
        free = shutil.disk_usage(run).free / 1e6
        fail(f"cannot write the checkpoint {folder} ({free:.0f} MB are free): {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if keep := meta.get("keep", 0):
        for old in checkpoints(run)[:-keep]:
            remove(old)
    return folder


def fsync(path: Path) -> None:
    """fsync a file or directory, if it exists."""
    if path.exists():
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def remove(checkpoint: Path) -> None:
    """Rename before deleting, so a crash never leaves a half-deleted step-N."""
    old = checkpoint.with_name(f".{checkpoint.name}.old.part")
    os.replace(checkpoint, old)
    shutil.rmtree(old, ignore_errors=True)


def full_state(optimizer: torch.optim.Optimizer, is_master: bool) -> dict:
    """Return the optimizer's state, unsharded, on the CPU; empty on ranks other than 0."""
    state, gathered = optimizer.state_dict(), {}
    for i, of_weight in state["state"].items():
        whole = {key: full_tensor(value) for key, value in of_weight.items()}
        gathered[i] = {key: value.cpu() for key, value in whole.items() if is_master}
    return state | {"state": gathered}


def load_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> None:
    """Load the state that `save_checkpoint` wrote, sharded as the weights are."""
    path = checkpoint / "training_state.pt"
    try:
        state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        for i, weight in enumerate(w for g in optimizer.param_groups for w in g["params"]):
            of_weight = state["state"].get(i, {})
            state["state"][i] = {key: shard_like(x, weight) for key, x in of_weight.items()}
        optimizer.load_state_dict(state)
    except Exception as error:  # a truncated file fails in many ways
        fail(f"cannot read the optimizer in {path}: {str(error)[:200]}")


# ------------------------------------------------------------------------------------------------
# Finding checkpoints


def verify_manifest(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint by its manifest; None if it is sound or has none."""
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
    """Return the folders RUN/step-N, ordered by N."""
    folders = [p for p in run.glob("step-*") if re.fullmatch(r"step-[0-9]+", p.name)]
    return sorted(folders, key=number)


def number(checkpoint: Path) -> int:
    """Return N of RUN/step-N."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_checkpoint(run: Path) -> Path | None:
    """Return the sound RUN/step-N with the largest N; None if the run has no checkpoint.

    Refuses a run in which all are broken.
    """
    faults = {}
    for folder in reversed(checkpoints(run)):
        if not (fault := verify_manifest(folder)):
            for broken, why in faults.items():
                warn(f"{broken} is broken and passed over: {why}")
            return folder
        faults[folder] = fault
    for broken, why in faults.items():  # the newest
        fail(f"{broken} is broken, and no other is there: {why}")
    return None


def newest_run(folder: Path) -> Path | None:
    """Return the run in a folder of runs whose newest checkpoint was written last; None if none."""
    runs = {step.parent for step in folder.glob("*/step-*") if step in checkpoints(step.parent)}
    return max(runs, key=lambda run: checkpoints(run)[-1].stat().st_mtime, default=None)


def find_checkpoint(name: str) -> Path:
    """Return a checkpoint, a run's newest one, or a model from the hub or its cache."""
    path = Path(name)
    with user_errors():  # names that no file system takes
        path.exists()
    is_local = path.exists() or name.startswith(("ckpt/", "models/"))
    if not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            patterns = ["*.json", "*.safetensors", "*.jinja"]
            return Path(snapshot_download(name, allow_patterns=patterns))
        except Exception as error:  # no such model, no permission, no network: dozens of kinds
            reason = str(error)[:300]
            fail(f"there is no folder {name}, nor can the hub be asked for that model: {reason}")
    if (path / "config.json").exists() or (path / MANIFEST).exists():
        fault = verify_manifest(path)
        require(not fault, f"{path} is broken: {fault}")
        return path
    require(path.is_dir(), f"there is no folder {path}")
    newest = newest_checkpoint(path)
    message = f"{path} holds no checkpoint: neither config.json nor step-N folders"
    require(newest is not None, message)
    return newest


def choose_checkpoints(names: list[str]) -> list[Path]:
    """Return one or two checkpoints; of a folder of runs the newest run's, beside its start."""
    require(len(names) <= 2, "name one checkpoint, or two to compare")
    folder = Path(names[0] if names else "ckpt")
    with user_errors():  # names that no file system takes
        run = newest_run(folder) if len(names) < 2 else None
    if run:
        paths = [find_checkpoint(str(run))]
        start = Path(load_meta(paths[0]).get("init_from", ""))
        if start.name and start.is_dir():
            return [find_checkpoint(os.path.relpath(start)), *paths]
        if start.name:
            warn(f"{start}, where {run} started, is gone: evaluating {run} alone")
        return paths
    require(any(names), "name one checkpoint, or train one: there is no run in ckpt/")
    paths = [find_checkpoint(name) for name in names]
    same = len({path.resolve() for path in paths}) < len(paths)
    require(not same, f"both names mean the checkpoint {paths[0]}")
    return paths


# ------------------------------------------------------------------------------------------------
# The log


def lock(file, run: Path) -> None:
    """Hold the log of a run until it is closed or this process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {run}")
    except OSError as error:
        why = f"this file system has no locks ({error})"
        warn(f"{why}: make sure that nothing else writes to {run}")


class Log:
    """RUN/metrics.jsonl, a row per update, which nobody else can write while this object lives.

    Rows after `done`, where the run resumes, are cut off.
    """

    def __init__(self, run: Path, done: int):
        self.path = run / LOG
        message = f"{self.path} is gone, though step-{done} is there"
        require(self.path.exists() or not done, message)
        with user_errors():
            run.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab", buffering=0)
        lock(self.file, run)
        newer = [p for p in checkpoints(run) if number(p) > done and not verify_manifest(p)]
        require(not newer, f"another process has just written to {run}")
        self.rows = read_log(self.path)[:done]
        updates = [row.get("update") for row in self.rows]
        for n in range(1, done + 1):
            present = n <= len(updates) and updates[n - 1] == n
            require(present, f"{self.path} lacks update {n}, though step-{done} is there")
        with self.path.open("rb") as file:
            self.file.truncate(sum(len(file.readline()) for _ in range(done)))

    def write(self, row: dict) -> None:
        """Append a row; numbers that are not finite become null."""
        nonfinite = {k for k, x in row.items() if isinstance(x, float) and not math.isfinite(x)}
        row = row | dict.fromkeys(nonfinite)
        self.rows.append(row)
        line = json.dumps(row).encode() + b"\n"
        with user_errors():
            same = os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
            require(same, f"{self.path} is no longer the file that this run writes to")
            written = self.file.write(line)
        require(written == len(line), f"{self.path} could not be written: the disk is full")


def read_log(path: Path) -> list[dict]:
    """Read the rows of a log, without a last line that a crash cut short."""
    with user_errors():
        lines = path.read_bytes().decode(errors="replace").split("\n")
    rows = []
    for line_number, line in enumerate(lines[:-1], 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        require(isinstance(row, dict), f"{path}, line {line_number}: this is no JSON object")
        rows.append(row)
    return rows
