"""Runs on disk: RUN/step-N, from which a run resumes exactly, and RUN/metrics.jsonl.

A checkpoint is a Hugging Face folder. Beside the model lie `training.json` (what made it),
`training_state.pt` (the optimizer; random streams are regenerated from the update's number) and
`manifest.json` (the SHA-256 of every file). With LoRA the model has its adapters merged, and
`adapter/` holds them alone. A checkpoint is renamed when complete, so a crash never leaves half of
one; one that is damaged later is detected by its manifest and passed over. One process at a time
writes to a run: it holds a lock on the log. Nothing loaded here can run code.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from itertools import takewhile
from math import isfinite
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from lib.checkpoint import find_weights, hf_config, load_meta, weights_to_save
from lib.distributed import World, full_tensor
from lib.files import delete, follow_umask, fsync, remove, rename
from lib.flags import fail, flag_name, parse_json_lines, require, user_errors, warn, write_json
from lib.fsdp import shard_like
from lib.lora import adapters_alone, save_adapters
from lib.responses import RESPONSES

MAY_DIFFER = {"out", "resume", "eval_every", "eval_problems", "save_every", "keep"}
MAY_DIFFER |= {"gradient_checkpointing", "fsdp"}  # flags that may change when a run is resumed
LOG, MANIFEST = "metrics.jsonl", "manifest.json"
OVERWRITTEN = (LOG, RESPONSES, "evaluation.json", "evaluation.png", "training.png")


def open_run(
    run: Path, resume_from: Path | None, config, stage: str, world: World
) -> tuple[int, Path | None]:
    """Return how many updates are done, 0 in a new run, and where a resumed run started, if known.

    Refuses a new run over another, a folder in use or not writable, and changed flags or start.
    """
    with user_errors():
        str(run).encode()  # tokenizers and safetensors open no other names
        path = next(path for path in (run, *run.absolute().parents) if os.path.lexists(path))
        require(path.is_dir() and os.access(path, os.W_OK | os.X_OK), f"cannot write to {path}")
        for file in map(run.joinpath, OVERWRITTEN):
            place = Path(os.path.realpath(file))
            inside = place.is_relative_to(os.path.realpath(run))
            require(inside, f"{file} is a link to {place}, which it would overwrite")
            writable = os.access(place, os.W_OK) and place.is_file()
            require(writable or not os.path.lexists(file), f"cannot write to {file}")
        if world.is_master and (run / LOG).exists():
            with (run / LOG).open("a") as file:
                lock(file, run)
    done, start = 0, None
    if config.resume:
        require(resume_from is not None, f"{run} holds no checkpoint to resume")
        meta = load_meta(resume_from)
        ours = meta.get("stage") == stage and "update" in meta
        require(ours, f"{resume_from} is no checkpoint of this script")
        renamed = False  # whether --init or --model says where the start was moved
        for flag, then, now in changed_flags(meta, config):
            names_start = flag in ("--init", "--model") and now not in ("", "tiny")
            renamed = names_start and "init_sha256" in meta
            require(renamed, f"{run} was started with {flag} {then}, not {now or 'without'}")
        for flag, digest in hash_inputs(config).items():
            same = meta.get("inputs", {}).get(flag) == digest
            require(same, f"the file of {flag} has changed since {run} was started")
        start, done = resumed_start(run, meta, named_start(config), renamed), meta["update"]
    else:
        require(not checkpoints(run), f"{run} holds a run already: give --resume or another --out")
    require(len(set(world.all_gather([done]))) == 1, f"ranks see different checkpoints in {run}")
    return done, start


@user_errors()
def resumed_start(run: Path, meta: dict, named: str = "", renamed=False) -> Path | None:
    """Return where a run started; None for a new model. Refuses other weights, or none.

    `named` is --init or --model. If it was `renamed`, it alone counts.
    """
    if not {"init_sha256", "init_from"} <= meta.keys():
        return None
    start = None if renamed else find_start(run, meta)
    if start is None and (renamed or is_hub_name(named) or (named and Path(named).exists())):
        found = find_checkpoint(named)
        same = holds_start(found, meta)
        other = f"the weights in {found} are not those from which {run} started"
        require(same or not renamed, other)
        start = found if same else None
    place, flag = meta["init_from"], "--init" if meta["stage"] == "grpo" else "--model"
    fault = f"there is no folder {place}, where {run} started"
    if os.path.isdir(place):
        fault = f"the weights in {place}, where {run} started, are no longer the same"
    require(start is not None, f"{fault}: say by {flag} where they are now")
    return start


def named_start(config) -> str:
    """Return what --init or --model names."""
    return config.init if hasattr(config, "init") else config.model


def describe_start(start: Path, named: str, run: Path) -> dict[str, str]:
    """Return what training.json says of a run's start, which --init or --model `named`."""
    folder = start.resolve()
    return {
        "init_from": str(folder),
        "init_beside": os.path.relpath(folder, run.resolve()),
        "init_name": named if is_hub_name(named) else str(folder),  # how PEFT finds it
        "init_sha256": weights_sha256(start),
    }


def find_start(run: Path, meta: dict) -> Path | None:
    """Return the folder with the weights from which a run started; None if they are gone.

    They are looked for where they were, and beside the run if both were moved together.
    """
    if not {"init_sha256", "init_from"} <= meta.keys():
        return None
    folders = (Path(meta["init_from"]), run / meta.get("init_beside", ""))
    return next((folder for folder in folders if holds_start(folder, meta)), None)


def holds_start(folder: Path, meta: dict) -> bool:
    """Whether a folder holds the weights from which a run started."""
    try:
        return weights_sha256(folder) == meta["init_sha256"]
    except (OSError, ValueError):  # none that can be read
        return False


def changed_flags(meta: dict, config) -> list[tuple[str, object, object]]:
    """Return the flags in which a config differs from a checkpoint's, with both values."""
    flags = {name: now for name, now in asdict(config).items() if name not in MAY_DIFFER}
    changed = [name for name, now in flags.items() if meta.get(name, now) != now]
    return [(flag_name(name), meta[name], flags[name]) for name in changed]


def hash_inputs(config) -> dict[str, str]:
    """Return the SHA-256 of the files that a run reads besides checkpoints, by flag."""
    files = {"data": getattr(config, "data", "")}
    for flag in ("reward", "tagger"):  # FILE.py:function
        files[flag] = getattr(config, flag, "").rpartition(":")[0]
    return {flag_name(flag): sha256(Path(file)) for flag, file in files.items() if file}


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a model's weights on disk. Raises ValueError if there are none."""
    files = sorted(set(find_weights(folder).values()))
    return hashlib.sha256("".join(map(sha256, files)).encode()).hexdigest()


def sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def save_checkpoint(
    run: Path, update: int, model, tokenizer, optimizer, meta: dict, is_master: bool = True
) -> Path:
    """Write RUN/step-UPDATE, whole or not at all. `meta` says as JSON what made it.

    Rank 0 writes; the others help to gather a sharded model. The newest meta["keep"] checkpoints
    are kept, or all if that is 0. Where the start under adapters is gone they are saved alone.
    """
    folder, draft = run / f"step-{update}", run / f".step-{update}.part"
    weights, state = weights_to_save(model, meta, is_master), optimizer.state_dict()
    for i, of_weight in state["state"].items():
        whole = {key: full_tensor(value) for key, value in of_weight.items()}
        state["state"][i] = {key: value.cpu() for key, value in whole.items() if is_master}
    if not is_master:
        return folder
    for old in run.glob(".step-*.part"):  # left by a run that was killed while it wrote
        delete(old, MANIFEST)
    try:
        draft.mkdir(parents=True)
        if weights is None:
            warn(f"{meta['init_from']} is gone or has changed: {adapters_alone(folder)}")
        else:
            save_file(weights, draft / "model.safetensors", {"format": "pt"})
        tokenizer.save(draft)
        stops = {"eos_token_id": tokenizer.stops, "pad_token_id": tokenizer.inner.pad_token_id}
        write_json(draft / "config.json", hf_config(model.config, tokenizer))
        write_json(draft / "generation_config.json", stops)
        write_json(draft / "training.json", {"update": update, **meta})
        torch.save(state, draft / "training_state.pt")
        if meta.get("lora"):
            save_adapters(model, meta["init_name"], draft / "adapter")
        follow_umask(draft, "config.json")
        files = sorted(file for file in draft.rglob("*") if file.is_file())
        write_json(draft / MANIFEST, {str(f.relative_to(draft)): sha256(f) for f in files})
        for path in (*draft.rglob("*"), draft, run / LOG, run / RESPONSES):
            fsync(path)
        for old in checkpoints(run, first=update):  # damaged ones, which were passed over
            remove(old, MANIFEST)
        rename(draft, folder, MANIFEST)
        fsync(run)
    except Exception as error:  # mostly a full disk, for which each library raises its own kind
        free = "unknown"
        with contextlib.suppress(OSError):  # the disk itself may be gone
            free = f"{shutil.disk_usage(run).free / 1e6:.0f}"
        fail(f"cannot write the checkpoint {folder} ({free} MB are free): {error}")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    for old in checkpoints(run)[: -meta.get("keep", 0)]:  # [:-0] is empty
        remove(old, MANIFEST)
    return folder


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


def verify_manifest(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint by its manifest; None if it is sound or has none."""
    try:
        if not os.path.lexists(checkpoint / MANIFEST):
            return None if any(checkpoint.iterdir()) else "it is empty"
        hashes = json.loads((checkpoint / MANIFEST).read_bytes())
        for name, digest in hashes.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:  # files may be links, though
                return f"{MANIFEST} names {name}, which lies elsewhere"
            if not (checkpoint / name).is_file():
                return f"{name} is missing"
            if sha256(checkpoint / name) != digest:
                return f"{name} is not as it was written"
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        return f"cannot read {MANIFEST}: {error}"
    return None


def checkpoints(run: Path, first: int = 0) -> list[Path]:
    """Return the folders RUN/step-N from N = `first` on, ordered by N."""
    names = re.compile(r"step-[0-9]+")
    found = [(int(p.name[5:]), p) for p in run.glob("step-*") if names.fullmatch(p.name)]
    return [folder for n, folder in sorted(found) if n >= first]


@user_errors()
def newest_checkpoint(run: Path) -> Path | None:
    """Return the sound RUN/step-N with the largest N, or None; refuse a run if all are broken."""
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


def is_hub_name(name: str) -> bool:
    """Whether this is the name of a model of the hub: no folder here, and none of a run."""
    is_local = Path(name).exists() or name.startswith(("ckpt/", "models/"))
    return not is_local and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


@user_errors()  # names that no file system takes, folders that nobody may read
def find_checkpoint(name: str) -> Path:
    """Return a checkpoint, a run's newest one, or a model from the hub or its cache."""
    path = Path(name)
    if is_hub_name(name):
        try:
            patterns = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
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
    require(newest is not None, f"{path} holds no checkpoint: no config.json, no step-N folder")
    return newest


@user_errors()
def choose_checkpoints(names: list[str]) -> list[Path]:
    """Return one or two checkpoints; of a folder of runs the newest run's, beside its start."""
    require(len(names) <= 2, "name one checkpoint, or two to compare")
    runs = []
    if len(names) < 2:
        folder = Path(names[0] if names else "ckpt")
        runs = [run for run in folder.glob("*") if checkpoints(run)]
    if runs:
        run = max(runs, key=lambda run: checkpoints(run)[-1].lstat().st_mtime)
        paths = [find_checkpoint(str(run))]
        meta = load_meta(paths[0])
        if start := find_start(run, meta):
            return [find_checkpoint(os.path.relpath(start)), *paths]
        if "init_from" in meta:
            warn(f"{meta['init_from']}, where {run} started, is gone: evaluating {run} alone")
        return paths
    require(any(names), "name one checkpoint, or train one: there is no run in ckpt/")
    paths = [find_checkpoint(name) for name in names]
    require(len(set(map(Path.resolve, paths))) == len(paths), f"both names mean {paths[0]}")
    return paths


def lock(file, run: Path) -> None:
    """Hold the log of a run until it is closed or this process ends, however it ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is writing to {run}")
    except OSError as error:
        warn(f"this file system has no locks ({error}): make sure nothing else writes to {run}")


class JsonLines:
    """A file of a run with JSON lines, each of an update; `done` updates of them are kept."""

    def __init__(self, path: Path):
        self.path = path
        with user_errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)

    def rewind(self, done: int) -> list[dict]:
        """Drop what is not of the first `done` updates, all if that is 0; return the rest."""
        rows = read_lines(self.path)
        kept = [*takewhile(lambda row: done and row[1].get("update") in range(done + 1), rows)]
        with self.path.open("rb") as file:
            n_lines = kept[-1][0] if kept else 0
            self.file.truncate(sum(len(file.readline()) for _ in range(n_lines)))
        return [row for _, row in kept]

    def write(self, *rows: dict) -> None:
        """Append rows."""
        lines = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        with user_errors():
            same = os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
            require(same, f"{self.path} is no longer the file that this run writes to")
            written = self.file.write(lines)
        require(written == len(lines), f"{self.path} could not be written: the disk is full")


class Log(JsonLines):
    """RUN/metrics.jsonl, a row per update up to `done`; locked while this object lives."""

    def __init__(self, run: Path, done: int):
        path = run / LOG
        require(path.exists() or not done, f"{path} is gone, though step-{done} is there")
        super().__init__(path)
        lock(self.file, run)
        newer = [folder for folder in checkpoints(run, done + 1) if not verify_manifest(folder)]
        require(not newer, f"another process has just written to {run}")
        updates = [row.get("update") for row in read_log(path)]
        for n in range(1, done + 1):
            require(updates[n - 1 : n] == [n], f"{path} lacks update {n} of {done}")
        self.rows = self.rewind(done)

    def write(self, row: dict) -> None:
        """Append a row; numbers that are not finite become null."""
        row = row | {k: None for k, x in row.items() if isinstance(x, float) and not isfinite(x)}
        super().write(row)
        self.rows.append(row)


def read_log(path: Path) -> list[dict]:
    """Read the rows of a log, without a last line that a crash cut short."""
    return [row for _, row in read_lines(path)]


@user_errors()
def read_lines(path: Path) -> list[tuple[int, dict]]:
    """Return the rows of a log and their numbers; refuse a line that is no JSON object."""
    return parse_json_lines(path, path.read_bytes().rpartition(b"\n")[0])
