"""What the scripts share while they run: flags, one-line refusals, the process group and random streams."""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import math
import os
import random
import re
import signal
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

Config, Item, Result = TypeVar("Config"), TypeVar("Item"), TypeVar("Result")


def say(message: str) -> None:
    """A line on stderr, apart from a progress bar that may be there."""
    # Ctrl-C may have ended the reader of a pipe, too, or come while another line is being written.
    with contextlib.suppress(OSError, RuntimeError):
        tqdm.write(f"{os.path.basename(sys.argv[0])}: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """One line on stderr, exit status 2: what a user can mend."""
    say(message)
    raise SystemExit(2)


def require(condition: bool, message: str) -> None:
    if not condition:
        fail(message)


def at_least(config, **least: float) -> None:
    """Refuse flags below their least value, and NaN; a flag that is None was not given."""
    for name, low in least.items():
        value = getattr(config, name)
        require(value is None or value >= low, f"--{name.replace('_', '-')} must be at least {low}, not {value}")


def warn(message: str) -> None:
    """A line on stderr, from one of all processes."""
    if os.environ.get("RANK", "0") == "0":
        say(message)


def check_outputs(json_file: str, plot: str) -> None:
    """Refuse --json and --plot files that cannot be written, before the work is done."""
    for name in (json_file, plot):
        there = os.access(Path(name).parent, os.W_OK) and not Path(name).is_dir()
        require(not name or there, f"{name} cannot be written: it is a folder, or its folder is missing or read-only")
    require(not plot or plot.endswith(".png"), "plots are PNG: give a name that ends in .png")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        fail(f"cannot read {path}: {error}")
    require(isinstance(value, dict), f"cannot read {path}: it holds no JSON object")
    return value


def write_json(path: Path, value: dict | list) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def refusals():
    """Turns an error that says what cannot be done into a refusal."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def parse_flags(config_class: type[Config], description: str, positional: str | None = None) -> Config:
    """Flags from a data class: one a field, its type from the annotation, its help from the comment on its line.

    The field named `positional` takes the arguments that are not flags.
    """
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(config_class), re.M))
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in dataclasses.fields(config_class):
        if field.name == positional:
            parser.add_argument(positional, nargs="*", metavar=positional.upper(), help=comments[field.name])
            continue
        kind, options = typing.get_type_hints(config_class)[field.name], {}
        if isinstance(kind, types.UnionType):  # `int | None`
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        if kind is bool:
            options["action"] = "store_true"
        elif typing.get_origin(kind) is Literal:
            options["choices"] = typing.get_args(kind)
        else:
            options["type"] = kind
        told = field.default is None or field.default is False or field.default == "" or "[" in comments[field.name]
        shown = "" if told else f" [{field.default}]"
        help_text = (comments[field.name] + shown).replace("%", "%%")
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=help_text, **options)
    return config_class(**vars(parser.parse_args()))


# ------------------------------------------------------------------------------------------------------------------
# Process group: one process per GPU, or any number of them on the CPU (gloo)


@dataclasses.dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all processes; where a process has none, it counts as zero.

        Those of a sharded model have been added up in the backward pass.
        """
        if self.size == 1 or is_sharded(model):
            return
        weights = [w for w in model.parameters() if w.requires_grad]
        for w in weights:
            if w.grad is None:
                w.grad = torch.zeros_like(w)
        flat = torch.cat([w.grad.flatten() for w in weights])
        dist.all_reduce(flat)
        for w, piece in zip(weights, flat.split([w.numel() for w in weights])):
            w.grad.copy_(piece.view_as(w))

    def gather(self, rows: list) -> list:
        """The rows of all processes, in the order of the ranks."""
        if self.size == 1:
            return rows
        everyone: list[list] = [[] for _ in range(self.size)]
        dist.all_gather_object(everyone, rows)
        return [row for one in everyone for row in one]

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()


def start() -> World:
    """Join the process group that torchrun describes in the environment, if any, and pick the device."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        require(local < there, f"one process a GPU: there are {there} GPUs and more processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if size > 1:
        gpu = device.type == "cuda"
        patience = datetime.timedelta(hours=2)  # others wait while one process evaluates and saves
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None, timeout=patience)
    return World(rank, size, device)


@contextlib.contextmanager
def processes() -> Iterator[World]:
    """`start`, and in the end the end of the process group. A process that fails leaves at once, so that torchrun can
    end the others: a process group's own end would wait for them."""
    world = start()
    try:
        yield world
    except BaseException as error:
        if world.size == 1:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)
    if world.size > 1:
        dist.destroy_process_group()


class Signals:
    """Notes SIGTERM and Ctrl-C, so that a run can finish its update and save before it leaves."""

    caught = 0

    def during(self, updates: tqdm) -> Iterator[int]:
        self.bar = updates
        before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield from updates
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        first, self.caught = not self.caught, number
        if first:
            self.bar.disable = True  # what shows it may be gone: Ctrl-C reaches all of `python ... | tee`
            warn(f"{signal.Signals(number).name}: saving after this update (kill -9 does not wait for it)")

    def leave(self, run: Path) -> NoReturn:
        """End after saving. (In another process than this one the signal may have been caught.)"""
        warn(f"stopped and saved; {run} can go on from there")
        raise SystemExit(128 + (self.caught or signal.SIGTERM))


def is_split(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor: a DTensor, a class that takes a second to import."""
    return hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's weights are split over the processes (sharding.py)."""
    return is_split(next(model.parameters()))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; of one that is split a collective, which all processes have to call."""
    return tensor.full_tensor() if is_split(tensor) else tensor


# ------------------------------------------------------------------------------------------------------------------
# Gradients


def clip_gradient(model: nn.Module, max_norm: float) -> float:
    """Clip the gradient to norm `max_norm`; its norm before."""
    return whole(nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], max_norm)).item()


def count_skipped(skipped: int, loss: float, norm: float, run: Path) -> int:
    """How many updates in a row had a loss or a gradient that is not finite, after `skipped` before this one.

    Such an update must not be taken. Refuses to go on after five.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        return 0
    require(
        skipped < 4,
        f"the loss ({loss}) or the length of the gradient ({norm}) was not finite in five updates one after the other. "
        "None of them was taken. Start a new run with a lower --lr or with --precision fp32, from the newest "
        f"checkpoint in {run} if there is one (--init, for SFT --model)",
    )
    return skipped + 1


# ------------------------------------------------------------------------------------------------------------------
# Threads: on the CPU, independent pieces of work run side by side, each on one core. Within small operations cores
# would spend more time waiting for one another than working, and where cores are shared they would wait in vain.


def n_threads(device: torch.device) -> int:
    """How many pieces of work run side by side: one on a GPU, else PyTorch's threads, but no more than Python's lock
    can feed."""
    return min(torch.get_num_threads(), 8) if device.type == "cpu" else 1


@functools.cache
def _pool(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """The function of each item, in order; on a GPU, or for a single item, without threads."""
    if len(items) == 1 or n_threads(device) == 1:
        return [function(item) for item in items]
    return list(_pool(n_threads(device)).map(function, items))


# ------------------------------------------------------------------------------------------------------------------
# Randomness: a stream for each purpose, made anew from its key, so that resuming needs no stored state


def stream(*key: int | str) -> random.Random:
    """Python's generator for a key such as (seed, "problems", update, rank)."""
    return random.Random(repr(key))


def places(seed: int, size: int, first: int, n: int) -> list[int]:
    """n indices from position `first` of an endless row of epochs, each a new permutation of range(size)."""
    wanted, orders = [divmod(i, size) for i in range(first, first + n)], {}
    for epoch in {epoch for epoch, _ in wanted}:
        orders[epoch] = list(range(size))
        stream(seed, "order", epoch).shuffle(orders[epoch])
    return [orders[epoch][place] for epoch, place in wanted]


def torch_stream(*key: int | str) -> torch.Generator:
    """PyTorch's generator (on the CPU) for a key."""
    return torch.Generator().manual_seed(stream(*key).getrandbits(63))
