"""What this process may use: the machine's memory and cores, or its container's share of them."""

import ctypes
import math
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")
PROCESS_BYTES = 3 * 10**8  # of Python with PyTorch and transformers, before any work
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def memory_limit() -> int:
    """Return the bytes of memory that this process may use, swap not counted."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *map(int, cgroup_values("memory.max"))])


saves_memory = False  # whether this process does


def save_memory() -> None:
    """Keep less for reuse of what was freed and compiled; call it before the first product.

    glibc would keep freed blocks up to 32 MB in a heap for each thread, which tensors of ever other
    sizes fragment: five layers of SmolLM2 peaked at 2.3 GB in the first update and at 3.1 in the
    tenth. Blocks above 1 MB now go back to the system. In bf16 oneDNN compiles a product for every
    shape, up to half a megabyte, and keeps 1024, as PyTorch does; a thread needs some forty at a
    time. A tiny model would be slower with this, and has no need of it.
    """
    global saves_memory
    saves_memory = True
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL("libc.so.6").mallopt(option, 2**20)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(64 * core_limit()))  # of all
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # of a thread


def return_memory() -> None:
    """Give back to the system what is free in glibc's heaps, where memory is saved.

    What training has freed, and then sampling, is up to 0.8 GB of SmolLM2. It takes up to 0.1 s.
    """
    if saves_memory:
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def core_limit() -> int:
    """Return how many cores this process may keep busy, a part of one counted as one."""
    quotas = [len(os.sched_getaffinity(0))]
    for quota, period in map(str.split, cgroup_values("cpu.max")):
        quotas.append(int(quota) / int(period))
    return max(1, math.ceil(min(quotas)))


def cgroup_values(name: str) -> Iterator[str]:
    """Yield what the files of this name hold in this process's cgroup and those above it.

    This is version 2 of cgroups. A container may see its own group as the root of the tree, under a
    path that exists on the host alone.
    """
    tree, of_process = ROOT / "sys/fs/cgroup", ROOT / "proc/self/cgroup"
    lines = of_process.read_text().splitlines() if of_process.exists() else []
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        for group in (tree / path, *(tree / path).parents):
            value = (group / name).read_text() if (group / name).exists() else "max"
            if group.is_relative_to(tree) and not value.startswith("max"):
                yield value
