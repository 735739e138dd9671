"""Runs on disk: RUN/step-N, from which a run resumes exactly, and RUN/metrics.jsonl.

A checkpoint is a Hugging Face folder. Beside the model lie `training.json` (what made it),
`training_state.pt` (the optimizer; random streams are regenerated from the update's number) and
`manifest.json` (the SHA-256 of every file). With LoRA `adapter/` holds the adapters, and the run's
last checkpoint alone also the model with them merged (lib/checkpoint.py merges the others). A
thread writes it while the next update runs, from a copy of all that changes: in memory, what is
trained and its two moments once more. A checkpoint is renamed when complete, so a crash never
leaves half of one; one that is damaged later is detected by its manifest and passed over. One
process at a time writes to a run: it holds a lock on the log. Nothing loaded here can run code.
"""

import fcntl
import json
import os
from concurrent.futures import Future
from dataclasses import asdict, fields
from itertools import takewhile
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from lib.checkpoint import (
    checkpoints,
    find_checkpoint,
    find_start,
    holds_start,
    is_hub_name,
    load_meta,
    load_model,
    save_configs,
    save_weights,
    weights_sha256,
)
from lib.distributed import World, full_tensor
from lib.files import delete, remove, sha256, verify_manifest, writer, written_whole
from lib.flags import fail, flag_name, parse_json_lines, require, user_errors, warn
from lib.fsdp import shard_like
from lib.lora import adapters_alone, peft_weights, save_adapters
from lib.responses import RESPONSES
from lib.transformer import hf_weights

MAY_DIFFER = {"out", "resume", "eval_every", "eval_problems", "save_every", "keep"}
MAY_DIFFER |= {"gradient_checkpointing", "fsdp"}  # flags that may change when a run is resumed
LOG = "metrics.jsonl"


def open_run(
    run: Path, resume_from: Path | None, config, stage: str, world: World
) -> tuple[int, Path | None]:
    """Return how many updates are done, 0 in a new run, and where a resumed run started, if known.

    Refuses a new run over another, a folder that is not writable, and changed flags or start.
    """
    with user_errors():  # a name that is too long
        place = next(path for path in (run, *run.absolute().parents) if path.exists())
    require(place.is_dir() and os.access(place, os.W_OK | os.X_OK), f"cannot write to {place}")
    done, start = 0, None
    if config.resume:
        require(resume_from is not None, f"{run} holds no checkpoint to resume: leave --resume out")
        meta = load_meta(resume_from)
        ours = meta.get("stage") == stage and "update" in meta
        require(ours, f"{resume_from} is no checkpoint of this script")
        renamed = False  # whether --init or --model says where the start was moved
        for flag, then, now in changed_flags(meta, config):
            names_start = flag in ("--init", "--model") and now not in ("", "tiny")
            renamed = names_start and "init_sha256" in meta
            require(renamed, f"{run} was started with {flag} {then}, not {now or 'without'}")
        for flag in changed_inputs(meta, config):
            changed = f"the file of {flag} has changed since {run} was started"
            require(flag == "--tagger", changed)
            warn(f"{changed}: labels may differ from here on")
        start, done = resumed_start(run, meta, named_start(config), renamed), meta["update"]
    else:
        evaluated = (run / "evaluation.json").exists()  # a finished run of GRPO
        fresh = not (evaluated or checkpoints(run))
        require(fresh, f"{run} holds a run already: give --resume or another --out")
    require(len(set(world.all_gather([done]))) == 1, f"ranks see different checkpoints in {run}")
    return done, start


def resumed_start(run: Path, meta: dict, named: str, renamed: bool) -> Path | None:
    """Return where a run started; None for a new model. Refuses other weights, or none.

    `named` is --init or --model. If it was `renamed`, it alone counts.
    """
    if "init_sha256" not in meta:
        return None
    start = None if renamed else find_start(run, meta)
    if start is None:
        start = find_checkpoint(named or meta["init_from"])
        flag = "--init" if meta["stage"] == "grpo" else "--model"
        fault = f"{start} does not hold the weights from which {run} started"
        require(holds_start(start, meta), f"{fault}: say by {flag} where they are now")
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


def changed_flags(meta: dict, config) -> list[tuple[str, object, object]]:
    """Return the flags in which a config differs from a checkpoint's, with both values.

    A flag that is newer than the checkpoint had its default, unless that depends on the model.
    """
    defaults, changed = {field.name: field.default for field in fields(config)}, []
    for name, now in asdict(config).items():
        default = now if defaults[name] is None else defaults[name]
        then = meta.get(name, default)
        if then != now and name not in MAY_DIFFER:
            changed.append((flag_name(name), then, now))
    return changed


def hash_inputs(config) -> dict[str, str]:
    """Return the SHA-256 of the files that a run reads besides checkpoints, by flag."""
    files = {"data": getattr(config, "data", "")}
    for flag in ("reward", "tagger"):  # FILE.py:function
        files[flag] = getattr(config, flag, "").rpartition(":")[0]
    return {flag_name(flag): sha256(Path(file)) for flag, file in files.items() if file}


def changed_inputs(meta: dict, config) -> list[str]:
    """Return the flags whose files are not those from which a checkpoint was made."""
    then = meta.get("inputs", {})
    return [flag for flag, digest in hash_inputs(config).items() if then.get(flag) != digest]


@user_errors()
def inherit_flags(config, meta: dict) -> None:
    """Take a checkpoint's problems where eval.py is given none, and its flags for reading them."""
    if (data := meta.get("data", "")) and not config.data:
        require(Path(data).exists(), f"{data}, its problems, is gone: say --data")
        config.data = data
    config.no_chat_template |= meta.get("no_chat_template", False)
    if config.data:
        if meta.get("tagger") and not config.tagger:
            warn(f"trained with --tagger {meta['tagger']}: without it all responses are alike")
        config.answer_pattern = config.answer_pattern or meta.get("answer_pattern", "")
        config.max_new_tokens = config.max_new_tokens or meta.get("max_new_tokens") or 0
    digest = meta.get("inputs", {}).get("--data")
    its_own = bool(data) and config.data == data and Path(data).is_file()
    if its_own and sha256(Path(data)) != digest:
        warn(f"{data} has changed: training may have seen what is validation now")


def save_checkpoint(
    run: Path, update: int, model, tokenizer, optimizer, meta: dict, is_master: bool = True
) -> Future | None:
    """Let a thread write RUN/step-UPDATE; return its future, whose result is that folder.

    What training changes, weights and two moments, is copied to the CPU's memory first. `meta` says
    as JSON what made it. Rank 0 writes; the others help to gather a sharded model.
    """
    trained = peft_weights(model).items() if meta.get("lora") else hf_weights(model)
    weights = {name: copy_to_cpu(weight) for name, weight in trained if is_master}
    state = optimizer.state_dict()
    for i, of_weight in state["state"].items():
        whole = {key: full_tensor(value) for key, value in of_weight.items()}
        state["state"][i] = {key: copy_to_cpu(x) for key, x in whole.items() if is_master}
    if not is_master:
        return None
    made_by = {"update": update, **meta}
    return writer.submit(write_checkpoint, run, made_by, weights, state, model.config, tokenizer)


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return an fp32 copy, also of a tensor that is there already."""
    return tensor.detach().to("cpu", torch.float32, copy=True)


def write_checkpoint(
    run: Path, meta: dict, weights: dict[str, Tensor], state: dict, config, tokenizer
) -> Path:
    """Write RUN/step-UPDATE, whole or not at all, behind the logs up to it; return the folder.

    The newest meta["keep"] checkpoints are kept, or all if that is 0. With LoRA the run's last one
    also gets the merged model, unless the start is gone.
    """
    folder = run / f"step-{meta['update']}"
    for old in run.glob(".step-*.part"):  # left by a run that was killed while it wrote
        delete(old)
    with written_whole(folder, run / LOG, run / RESPONSES) as draft:
        torch.save(state, draft / "training_state.pt")
        save_configs(draft, config, tokenizer, meta)
        last = meta["update"] == meta.get("total")
        if not meta.get("lora"):
            save_weights(weights, draft)
        else:
            save_adapters(weights, meta, draft / "adapter")
            if last and not (find_start(run, meta) and saved_merged(draft)):
                warn(adapters_alone(folder, meta["init_from"]))
        for old in checkpoints(run, first=meta["update"]):  # damaged ones, which were passed over
            remove(old)
    for old in checkpoints(run)[: -meta.get("keep", 0)]:  # [:-0] is empty
        remove(old)
    return folder


def saved_merged(draft: Path) -> bool:
    """Add the merged model to a checkpoint of adapters, if that is possible and fits in memory."""
    try:
        save_weights(dict(hf_weights(load_model(draft)[0])), draft)
        return True
    except (MemoryError, RuntimeError, SystemExit):  # PyTorch's is the second: adapters first
        return False


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
        fail(f"cannot read the optimizer in {path}, or it is another: {str(error)[:200]}")


@user_errors()
def choose_checkpoints(names: list[str]) -> list[Path]:
    """Return one or two checkpoints; of a folder of runs the newest run's, beside its start."""
    require(len(names) <= 2, "name one checkpoint, or two to compare")
    runs, folder = [], Path(names[0] if names else "ckpt")
    if len(names) < 2 and not checkpoints(folder):
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
