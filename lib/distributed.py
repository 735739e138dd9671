"""Processes, signals and threads: one process per GPU, or any number of them on the CPU (gloo)."""

import contextlib
import dataclasses
import datetime
import functools
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from lib.files import writer
from lib.flags import is_alone, quiet_pipes, require, warn
from lib.limits import core_limit


@dataclasses.dataclass(frozen=True)
class World:
    """This process among all, with the collectives that training needs."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_master(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def all_reduce(self, *values: float) -> list[float]:
        """Sum each value over all processes."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def all_reduce_gradients(self, model: nn.Module) -> None:
        """Sum gradients over all processes, a missing one as zero; FSDP has done so already."""
        if self.world_size == 1 or is_fsdp(model):
            return
        weights = [w for w in model.parameters() if w.requires_grad]
        for w in weights:
            w.grad = torch.zeros_like(w) if w.grad is None else w.grad
        flat = torch.cat([w.grad.flatten() for w in weights])
        dist.all_reduce(flat)
        for w, piece in zip(weights, flat.split([w.numel() for w in weights])):
            w.grad.copy_(piece.view_as(w))

    def all_gather(self, rows: list) -> list:
        """Return the rows of all processes, in the order of the ranks."""
        if self.world_size == 1:
            return rows
        gathered: list[list] = [[] for _ in range(self.world_size)]
        dist.all_gather_object(gathered, rows)
        return [row for of_rank in gathered for row in of_rank]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def processes_here() -> int:
    """Return how many of a run's processes share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if dist.is_initialized() else 1


def init_distributed() -> World:
    """Join the process group that torchrun describes in the environment, and pick the device."""
    rank, world_size, local = 0, 1, 0
    if not is_alone():
        by_torchrun = {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        require(by_torchrun, "WORLD_SIZE is set, but not what torchrun sets beside it: unset it")
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    torch.set_num_threads(min(torch.get_num_threads(), core_limit()))
    if torch.cuda.is_available():
        n_gpus = torch.cuda.device_count()
        require(local < n_gpus, f"one process per GPU: there are {n_gpus} GPUs and more processes")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world_size > 1:
        backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        patience = datetime.timedelta(hours=2)  # the others wait while rank 0 evaluates and saves
        dist.init_process_group(backend, device_id=device_id, timeout=patience)
    return World(rank, world_size, device)


@contextlib.contextmanager
def distributed() -> Iterator[World]:
    """Initialise the process group and destroy it on exit."""
    world = init_distributed()
    try:
        with quiet_pipes():
            yield world
    except BaseException as error:
        if world.world_size > 1:  # whose end torchrun announces to the others by SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        writer.submit(int).result()  # a checkpoint that is being written is finished first
        if world.world_size == 1:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        if sys.stdout:  # none with python ... >&-
            sys.stdout.flush()  # and exit at once: destroy_process_group() waits for other ranks
        has_status = isinstance(error, SystemExit) and isinstance(error.code, int)
        os._exit(error.code if has_status else 1)
    if world.world_size > 1:
        dist.destroy_process_group()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor. (Importing DTensor takes a second.)"""
    return hasattr(tensor, "full_tensor")


def is_fsdp(model: nn.Module) -> bool:
    """Whether the model's weights are sharded over the processes (lib/fsdp.py)."""
    return is_dtensor(next(model.parameters()))


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; of a DTensor a collective, which all processes have to call."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held, in GB: of the GPU or the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


class Signals:
    """Catch SIGTERM, Ctrl-C and a closed terminal: a run finishes its update, saves and exits."""

    caught = 0

    def during(self, updates: tqdm) -> Iterator[int]:
        """Yield the updates with the handlers installed."""
        self.bar, numbers = updates, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        heeded = [n for n in numbers if signal.getsignal(n) != signal.SIG_IGN]  # nohup ignores one
        before = {number: signal.signal(number, self.note) for number in heeded}
        try:
            yield from updates
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number: int, frame) -> None:
        first, self.caught = not self.caught, number
        if first:
            self.bar.disable = True  # Ctrl-C ends all of `python ... | tee`: its pipe may be gone
            name = signal.Signals(number).name
            warn(f"{name}: saving after this update (kill -9 does not wait for it)")


def n_threads(device: torch.device) -> int:
    """Return how many pieces of work run in parallel: 1 on a GPU, else PyTorch's threads.

    A piece then has one core: on small ops, intra-op threading costs more in synchronisation than
    it gains, and stalls on busy machines. At most 8: more would wait for Python's lock.
    """
    return min(torch.get_num_threads(), 8) if device.type == "cpu" else 1


@functools.cache
def _pool(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))


def in_threads(function: Callable, items: Sequence, device: torch.device) -> list:
    """Map the function over the items, in order; without threads on a GPU.

    A single item has a thread, too: this one would compile, and keep, its products once more.
    """
    n = n_threads(device)
    if n == 1:
        return [function(item) for item in items]
    return list(_pool(n).map(function, items))
