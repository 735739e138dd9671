"""Faults: kills at any moment, a full disk, a process that dies, two hosts; pytest -m slow."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import same_weights

import train_sft
from lib.checkpoint import checkpoints, load_model, newest_checkpoint
from lib.files import verify_manifest
from lib.run_dir import read_log

pytestmark = pytest.mark.slow
HERE = Path(train_sft.__file__).parent
TASK = "--field=3 --steps=1-2 --precision=fp32 --save-every=1"
SFT = f"train_sft.py {TASK} --updates=240 --keep=2 --batch-size=8 --warmup=0 --eval-every=20"
GRPO = f"train_grpo.py {TASK} --updates=140 --prompts-per-update=4 --group-size=4"
GRPO += " --eval-problems=8 --beta=0.05 --examples=10"
ENVIRONMENT = os.environ | {
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A model for GRPO to start from, half trained."""
    folder = tmp_path_factory.mktemp("start")
    wait(begin(SFT.replace("240", "150").replace("every=1", "every=150"), folder), 0)
    return folder


def begin(command: str, out: Path, processes: int = 0) -> subprocess.Popen:
    """Start a script, with --resume if its run has checkpoints."""
    script, *flags = command.split()
    run = [sys.executable]
    if processes:
        run += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    resume = ["--resume"] if checkpoints(out) else []
    words = [*run, str(HERE / script), f"--out={out}", *flags, *resume]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, env=ENVIRONMENT, text=True, **pipes)


def wait(process: subprocess.Popen, status: int, timeout: float = 600) -> str:
    """Wait for a process to end; return its stderr."""
    _, err = process.communicate(timeout=timeout)
    assert process.returncode == status, err[-2000:]
    return err


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def workers(torchrun: subprocess.Popen) -> dict[int, int]:
    """Return the process ids of torchrun's workers by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = re.search(r"\nPPid:\s*(\d+)", (process / "status").read_text())
            rank = re.search(rb"\0RANK=(\d+)\0", b"\0" + (process / "environ").read_bytes())
        except OSError:  # it has just ended
            continue
        if int(parent[1]) == torchrun.pid and rank:
            found[int(rank[1])] = int(process.name)
    return found


def kill(process: subprocess.Popen, out: Path, moment: str, rng: random.Random) -> None:
    """kill -9 a run while it starts, trains or saves."""
    log = out / "metrics.jsonl"
    before, deadline = size(log), time.monotonic() + 60
    if moment == "starting":
        time.sleep(rng.uniform(0, 6))
    while moment != "starting" and process.poll() is None and time.monotonic() < deadline:
        if size(log) > before and (moment == "training" or list(out.glob(".step-*.part"))):
            break
        time.sleep(0.001)
    if moment == "training":
        time.sleep(rng.uniform(0, 0.3))
    if process.poll() is None:
        os.kill(process.pid, signal.SIGSTOP)  # it writes nothing and starts no workers meanwhile
        for pid in (*workers(process).values(), process.pid):  # workers would outlive torchrun
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def without_times(run: Path) -> list[dict]:
    changing = re.compile("per_second|memory")
    rows = read_log(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not changing.search(key)} for row in rows]


def numbers(run: Path) -> list[dict]:
    """Return the log's numbers, without the largest rounding difference, which may differ."""
    return [
        {key: value for key, value in row.items() if value is not None and key != "logp_diff_max"}
        for row in without_times(run)
    ]


def same_end(a: Path, b: Path) -> bool:
    """Compare weights, optimizer and log (which follows the order of the data), bit for bit."""
    last = [newest_checkpoint(run) for run in (a, b)]
    assert last[0].name == last[1].name
    states = [torch.load(folder / "training_state.pt") for folder in last]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for i, of_weight in states[0]["state"].items():
        assert all(
            torch.equal(value, states[1]["state"][i][key]) for key, value in of_weight.items()
        )
    assert without_times(a) == without_times(b)
    kept = [run / "responses.jsonl" for run in (a, b)]
    texts = [file.read_bytes() if file.exists() else None for file in kept]
    assert texts[0] == texts[1] and texts[0] != b"", "the responses of GRPO, which SFT has not"
    return same_weights(*(load_model(folder)[0] for folder in last))


MOMENTS = ("starting", "training", "saving")


@pytest.mark.parametrize(
    "command, processes, kills", [(SFT, 0, 15), (GRPO, 0, 15), (SFT, 2, 3), (GRPO, 2, 3)], ids=str
)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    command, processes, kills, start, tmp_path
):
    """30 kills of single processes, 6 of torchrun with two; a third during a save."""
    if command is GRPO:
        command += f" --init={start}"
    straight, killed, rng = tmp_path / "straight", tmp_path / "killed", random.Random(kills)
    wait(begin(command, straight, processes), 0)
    drafts = 0
    for i in range(kills):
        process = begin(command, killed, processes)
        kill(process, killed, MOMENTS[i % 3], rng)
        assert process.returncode == -signal.SIGKILL, (
            "the run ended before it was killed: the test needs more updates"
        )
        drafts += bool(list(killed.glob(".step-*.part")))
        for folder in checkpoints(killed):
            assert verify_manifest(folder) is None, "every folder with a checkpoint's name is whole"
    wait(begin(command, killed, processes), 0)
    assert same_end(straight, killed) and drafts >= max(1, kills // 3 - 1)
    assert not list(killed.glob(".step-*.part"))


def test_a_full_disk(tmp_path):
    """A file system of 40 MB: the run ends in one line, and its checkpoint resumes elsewhere."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        err = wait(begin(SFT.replace("--keep=2", ""), disk / "run"), 2)
        (line,) = [line for line in err.splitlines() if "train_sft.py:" in line]
        assert "cannot write the checkpoint" in line and "is the disk full?" in line
        assert not list((disk / "run").glob(".step-*.part"))
        assert checkpoints(disk / "run") and all(
            verify_manifest(folder) is None for folder in checkpoints(disk / "run")
        )
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    wait(begin(SFT, tmp_path / "straight"), 0)
    wait(begin(SFT, tmp_path / "run"), 0)
    assert same_end(tmp_path / "run", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_ends_the_others(number, tmp_path):
    """Killed: within a minute, its rank reported. On SIGTERM all save and leave together."""
    process = begin(
        SFT.replace("240", "100000").replace("save-every=1", "save-every=50"), tmp_path / "run", 2
    )
    while size(tmp_path / "run" / "metrics.jsonl") < 2000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.kill(workers(process)[1], number)
    clock = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - clock < 60
    if number == signal.SIGKILL:
        assert re.search(r"rank\s*: 1 .*exitcode\s*: -9", err.replace("\n", " ")), err[-3000:]
    else:
        done = len(read_log(tmp_path / "run" / "metrics.jsonl"))
        assert (
            "stopped and saved" in err
            and newest_checkpoint(tmp_path / "run").name == f"step-{done}"
        )


@pytest.fixture
def two_hosts():
    """Connect two network namespaces, which torchrun takes for two hosts."""

    if shutil.which("ip") is None:
        pytest.skip("needs the command ip")

    def ip(words: str) -> int:
        return subprocess.run(["ip", *words.split()], capture_output=True).returncode

    for i in (0, 1):
        ip(f"netns del grpo{i}")  # left by a test that was killed
    if ip("netns add grpo0"):
        pytest.skip("needs the right to make network namespaces")
    ip("netns add grpo1")
    ip("link add cable0 netns grpo0 type veth peer name cable1 netns grpo1")
    for i in (0, 1):
        ip(f"-n grpo{i} addr add 10.77.0.{i + 1}/24 dev cable{i}")
        ip(f"-n grpo{i} link set cable{i} up")
        ip(f"-n grpo{i} link set lo up")
    yield [f"ip netns exec grpo{i} env GLOO_SOCKET_IFNAME=cable{i}" for i in (0, 1)]
    for i in (0, 1):
        ip(f"netns del grpo{i}")


def test_two_hosts(two_hosts, start, tmp_path):
    """torchrun --nnodes 2 gives the curve of one process, for 1 and for 2 processes a host."""
    flags = [*GRPO.replace("140", "4").split()[1:], f"--init={start}"]
    wait(begin(f"train_grpo.py {' '.join(flags)}", tmp_path / "one"), 0)
    for each in (1, 2):
        launched = []
        for i, host in enumerate(two_hosts):
            run = f"{host} {sys.executable} -m torch.distributed.run --nnodes=2 --node-rank={i}"
            run += f" --master-addr=10.77.0.1 --master-port=29511 --nproc-per-node={each}"
            run += f" {HERE}/train_grpo.py --out={tmp_path}/two-{each}"
            words = [*run.split(), *flags]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            launched.append(subprocess.Popen(words, env=ENVIRONMENT, **pipes))
        for process in launched:
            wait(process, 0, timeout=120)
        for ours, theirs in zip(
            numbers(tmp_path / f"two-{each}"), numbers(tmp_path / "one"), strict=True
        ):
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_the_number_of_processes_leaves_the_curve_as_it_is(processes, start, tmp_path):
    for stage, command in (
        ("sft", SFT.replace("240", "12")),
        ("rl", GRPO.replace("140", "6") + f" --init={start}"),
    ):
        runs = [tmp_path / f"{stage}-{name}" for name in ("one", "many")]
        wait(begin(command, runs[0]), 0)
        wait(begin(command, runs[1], processes), 0)
        for one, many in zip(*map(numbers, runs), strict=True):
            assert many == pytest.approx(one, rel=1e-3, abs=1e-5), stage
