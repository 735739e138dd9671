"""What this process may use: the machine's memory and cores, or its container's share of them."""

import contextlib
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
    limits = cgroup_values("memory", "memory.max", "memory.limit_in_bytes")
    return min([total, *(int(limit) for limit in limits)])


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
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL("libc.so.6").mallopt(option, 2**20)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(64 * core_limit()))  # of all
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")  # of a thread


def return_memory() -> None:
    """Give back to the system what is free in glibc's heaps, where memory is saved.

    What training has freed, and then sampling, is up to 0.8 GB of SmolLM2. It takes up to 0.1 s.
    """
    if not saves_memory:
        return
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def core_limit() -> int:
    """Return how many cores this process may keep busy, a part of one counted as one."""
    quotas = [len(os.sched_getaffinity(0))]
    for quota, period in (words.split() for words in cgroup_values("cpu", "cpu.max")):
        quotas.append(int(quota) / int(period))
    pairs = zip(*(cgroup_values("cpu", f"cpu.cfs_{name}_us") for name in ("quota", "period")))
    quotas += [int(quota) / int(period) for quota, period in pairs if int(quota) > 0]
    return max(1, math.ceil(min(quotas)))


def cgroup_values(controller: str, *names: str) -> Iterator[str]:
    """Yield what the files of these names hold in this process's cgroup and those above it.

    Version 2 has one tree of groups, version 1 one for each controller. A container may see its
    own group as the root of the tree, under a path that exists on the host alone.
    """
    mounts = ROOT / "sys/fs/cgroup"
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        tree = mounts / controller if controllers else mounts
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            values = [_read(folder / name).strip() for name in names]
            yield from (value for value in values if value and not value.startswith("max"))
            if folder == tree:
                break


def _read(file: Path) -> str:
    """Return a file's text; "" if there is none that can be read."""
    try:
        return file.read_text(errors="surrogateescape")
    except OSError:
        return ""
