"""What this process may use: containers' limits on memory and cores, torchrun's variables."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import small_model

from lib import limits
from lib.attention import cache_bytes
from lib.distributed import World, init_distributed, processes_here
from lib.flags import warn
from lib.limits import PROCESS_BYTES, core_limit, memory_limit
from lib.memory import (
    CPU_BYTES,
    CPU_CACHE,
    activation_bytes,
    keys_per_token,
    micro_batch_tokens,
    still_to_come,
)
from lib.policy import empty_model, make_policy
from lib.transformer import ModelConfig
from rollout import Sampler
from train_grpo import GrpoConfig

ROOT = Path(limits.__file__).parent.parent
GB = 2**30
CONTAINERS = {  # files under /; memory in bytes and cores
    "version 2, as the container sees it": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{GB}\n",
            "sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        (GB, 1),
    ),
    "version 2, as the host sees it": (
        {
            "proc/self/cgroup": "0::/system.slice/run.scope\n",
            "sys/fs/cgroup/system.slice/memory.max": f"{GB}\n",
            "sys/fs/cgroup/system.slice/run.scope/memory.max": "max\n",
            "sys/fs/cgroup/system.slice/run.scope/cpu.max": "max 100000\n",
        },
        (GB, None),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "9:cpu,cpuacct:/docker/ab\n8:memory:/docker/ab\n0::/\n",
            "sys/fs/cgroup/memory/docker/ab/memory.limit_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_quota_us": "100000\n",
            "sys/fs/cgroup/cpu/docker/ab/cpu.cfs_period_us": "100000\n",
        },
        (GB, 1),
    ),
    "version 1, mounted as the container's own": (
        {
            "proc/self/cgroup": "9:cpu,cpuacct:/docker/ab\n8:memory:/docker/ab\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        (GB, None),
    ),
    "no limits": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, (None,) * 2),
    "no cgroups": ({}, (None, None)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_containers_limits_count(name, tmp_path, monkeypatch):
    files, expected = CONTAINERS[name]
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert memory_limit() == (expected[0] or machine) and core_limit() == (expected[1] or 8)


def test_what_does_not_fit_the_container_waits(monkeypatch):
    """A tenth of the memory holds a tenth of the groups; four processes here share it."""
    sampler = Sampler(small_model(), [1], 8, 100)
    monkeypatch.setattr("lib.memory.CPU_CACHE", 10 * GB)
    monkeypatch.setattr("lib.memory.memory_limit", lambda: 10 * GB + PROCESS_BYTES)
    groups = sampler.max_groups(50)
    monkeypatch.setattr("lib.memory.memory_limit", lambda: GB + PROCESS_BYTES)
    assert sampler.max_groups(50) == pytest.approx(groups / 10, rel=0.01) and groups > 100
    monkeypatch.setattr("lib.memory.memory_limit", lambda: GB + 4 * PROCESS_BYTES)
    monkeypatch.setattr("lib.memory.processes_here", lambda: 4)
    assert sampler.max_groups(50) == pytest.approx(groups / 40, rel=0.1)
    monkeypatch.setattr("lib.memory.memory_limit", lambda: PROCESS_BYTES)
    assert sampler.max_groups(50) == 1


def test_prompts_wait_whose_prefill_does_not_fit():
    """Bug: responses of few tokens need little cache, but all prompts were computed at once."""
    model = small_model(intermediate_size=512)
    long, short = (Sampler(model, [1], 1, T).max_groups(200) for T in (9000, 2))
    layer = 4 * (3 * 512 + 32 + 32)  # bytes of a token in fp32
    assert short * 200 * layer <= CPU_CACHE < (short + 1) * 200 * layer
    assert long * cache_bytes(model, 1, 1, 200, 9000) <= CPU_CACHE and long < short


def test_a_cache_on_the_cpu_is_not_larger_than_serves(monkeypatch):
    """An evaluation of SmolLM2 took 0.7 GB for each thread, and was no faster by it."""
    sampler = Sampler(small_model(), [1], 8, 100)
    monkeypatch.setattr("lib.memory.memory_limit", lambda: 1000 * GB)
    groups, shape = sampler.max_groups(50), (8, 50, 100)
    held = [cache_bytes(sampler.model, n, *shape) for n in (groups, groups + 1)]
    assert held[0] <= CPU_CACHE < held[1]


GIVES_BACK = """
import os
from lib.limits import return_memory, save_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [b"x" * 65536 for _ in range(3000)]
blocks[:-1] = []  # the last one keeps the heap from shrinking
before = resident()
return_memory()
kept = before - resident()
save_memory()
return_memory()
print(kept, before - resident())
"""


def test_what_is_free_in_the_heap_goes_back():
    command = [sys.executable, "-c", GIVES_BACK]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    unless_saved, saved = map(int, done.stdout.split())
    assert unless_saved < 1e6 < 150e6 < saved


def test_micro_batches_fill_what_training_leaves_free(monkeypatch):
    """In bytes: gradient, moments (until they are there), logits, and activations of each token."""
    model, world = small_model(hidden_size=512), World(0, 1, torch.device("cuda"))
    config = GrpoConfig(lora=0)
    run = SimpleNamespace(config=config, master=model, policy=model)
    run.optimizer = torch.optim.AdamW(model.parameters())
    trained, head = sum(w.numel() for w in model.parameters()), model.lm_head.weight.numel()
    fixed = 4 * trained + 12 * head + 20 * 2**27
    assert still_to_come(run, world) == fixed + 12 * trained
    assert still_to_come(run, dataclasses.replace(world, world_size=2)) == fixed + 16 * trained
    assert still_to_come(run, dataclasses.replace(world, device=torch.device("cpu"))) == 0
    free = "lib.memory.free_bytes"
    monkeypatch.setattr(free, lambda device: (still_to_come(run, world) + GB) / 0.9)
    in_fp32 = micro_batch_tokens(run, world)
    n_bytes = 3 * activation_bytes(model.config, 0, False, False)
    assert in_fp32 % 1024 == 0 and GB / n_bytes - 1024 < in_fp32 <= GB / n_bytes + 1
    run.policy = make_policy(model, "bf16")
    run.optimizer.state[0] = {}  # the moments are there
    assert still_to_come(run, world) == fixed + 4 * trained - 2 * trained
    assert 2 * in_fp32 < micro_batch_tokens(run, world) < 3 * in_fp32  # without Triton
    assert micro_batch_tokens(run, world, keys_per_token=50.0) < micro_batch_tokens(run, world)
    lengths = torch.tensor([10, 20]), torch.tensor([[3, 4], [5, 6]])
    assert keys_per_token(*lengths) == (30 + 2 * 30 + 18) / (30 + 18)


def test_micro_batches_of_the_cpu_keep_as_much_in_fp32_as_in_bf16(monkeypatch):
    """On a small machine they keep half of a thread's share of its memory."""
    world, config = World(0, 1, torch.device("cpu")), GrpoConfig(lora=0)
    for dtype, itemsize in ((torch.float32, 4), (torch.bfloat16, 2)):
        policy = empty_model(ModelConfig(8, 512, 1024, 24), dtype, "cpu")
        n_bytes = activation_bytes(policy.config, 0, False, False) * itemsize / 2
        run = SimpleNamespace(config=config, policy=policy)
        with monkeypatch.context() as patch:
            patch.setattr("lib.memory.n_threads", lambda device: 8)
            for memory, kept in ((1000 * GB, CPU_BYTES), (8 * GB, GB / 2), (GB, 0)):
                limit = memory + PROCESS_BYTES
                patch.setattr("lib.memory.memory_limit", lambda limit=limit: limit)
                expected = max(256, int(kept / n_bytes))
                assert 256 <= micro_batch_tokens(run, world) == expected < 2048


def test_threads_are_as_many_as_the_cores(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("lib.distributed.core_limit", lambda: 1)
    init_distributed()
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


EACH_WAY = """
import os
for how in ("saves", "keeps"):  # in processes of their own, which need not import PyTorch again
    if os.fork():
        assert os.wait()[1] == 0
        continue
    if how == "saves":
        save_memory()
    print(grown(), flush=True)
    os._exit(0)
"""


def grown_by(script: str) -> tuple[float, float]:
    """Return by how many megabytes `grown` of a script grows with and without save_memory."""
    env = {name: x for name, x in os.environ.items() if "CACHE_CAPACITY" not in name}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script + EACH_WAY]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    saving, keeping = map(float, done.stdout.split())
    return saving, keeping


FREED = """
import random, re, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from lib.limits import save_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
def work(seed):
    rng, kept = random.Random(seed), []
    for _ in range(10):
        large = [torch.ones(rng.randint(2, 30) * 250_000) for _ in range(8)]
        kept.append([torch.ones(2000) for _ in large])
        rng.shuffle(large)
        del large
    return kept
def grown():
    before = resident()
    with ThreadPoolExecutor(2) as pool:
        kept = list(pool.map(work, range(2)))
        return resident() - before
"""


def test_freed_memory_goes_back_to_the_system():
    """What stays resident once two threads have freed their large tensors."""
    saving, keeping = grown_by(FREED)
    assert saving < 30 and keeping > 60


COMPILED = """
import re, torch
from pathlib import Path
from lib.limits import save_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1e3
def grown():
    weight, x = (torch.ones(n, 576, dtype=torch.bfloat16) for n in (64, 2048))
    before = resident()
    for n in range(300, 900):
        torch.nn.functional.linear(x[:n], weight)
    return resident() - before
"""


def test_few_compiled_products_are_kept():
    """What stays resident after products of 600 shapes."""
    saving, keeping = grown_by(COMPILED)
    if keeping < 100:
        pytest.skip("this CPU's products in bf16 are not compiled")
    assert saving < keeping / 2


STRAY = [  # what something other than torchrun may have left in the environment
    {"RANK": "1"},
    {"RANK": "1", "WORLD_SIZE": "1", "LOCAL_RANK": "3"},
    {"LOCAL_RANK": "2"},
    {"RANK": "x"},
    {"MASTER_ADDR": "nowhere", "MASTER_PORT": "1"},
    {"WORLD_SIZE": ""},
    {"LOCAL_WORLD_SIZE": "8"},
]


@pytest.mark.parametrize("variables", STRAY)
def test_one_process_works_as_one_whatever_was_left_in_the_environment(
    variables, monkeypatch, capsys
):
    sizes = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for variable in (*sizes, "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    world = init_distributed()
    assert world.is_master and world.world_size == 1 and processes_here() == 1
    warn("heard")
    assert "heard" in capsys.readouterr().err


def test_one_process_of_several_warns(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        warn(f"heard from {rank}")
    (line,) = capsys.readouterr().err.splitlines()
    assert "heard from 0" in line


def test_a_cache_leaves_free_what_is_reserved(monkeypatch):
    monkeypatch.setattr("rollout.free_bytes", lambda device: 10 * GB)

    def groups(reserved: int) -> int:
        return Sampler(small_model(), [1], 8, 100, 1.0, lambda: reserved).max_groups(50)

    assert groups(5 * GB) == pytest.approx(groups(0) / 2, rel=0.01)
