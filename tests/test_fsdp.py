"""--fsdp on gloo processes: sharded training equals unsharded training, checkpoints included."""

import os
import shutil
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_pretrained, refusal, start_processes
from torch.distributed.tensor import DTensor

import strategies
import train_grpo
import train_sft
from lib import checkpoint, plots
from lib.checkpoint import load_model
from lib.distributed import World, init_distributed
from lib.run_dir import read_log
from lib.transformer import ModelConfig
from strategies import Response, score_response

ONE = World(0, 1, torch.device("cpu"))
SFT = {
    "field": 3,
    "steps": "1-2",
    "updates": 3,
    "batch_size": 7,
    "warmup": 0,
    "position_gap": 9,
    "save_every": 2,
}
GRPO = {
    "field": 3,
    "steps": "1-2",
    "updates": 3,
    "prompts_per_update": 6,
    "group_size": 4,
    "eval_problems": 4,
    "lr": 1e-3,
}
GRPO |= {"beta": 0.05, "save_every": 2, "temperature": 1.0}
GRPO["micro_batch_tokens"] = 60  # so few that ranks differ in their number of passes
PRETRAINED = {
    "lora": 0,
    "examples": 0,
    "precision": "bf16",
    "gradient_checkpointing": True,
    "no_chat_template": True,
    "keep": 0,
    "updates": 1,
}
SMALLER = ModelConfig(0, hidden_size=96, intermediate_size=288, num_hidden_layers=2)


def score_by_checksum(problem, text: str, stopped: bool) -> Response:
    """Reward what a random model can write: texts that happen to have a certain checksum."""
    right = zlib.crc32(text.encode()) % 3 == 0
    return replace(score_response(problem, text, stopped), correct=right, reward=float(right))


def train(folder: Path, world: World, fsdp: bool, resume: bool = False) -> None:
    strategies.score_response, plots.save = score_by_checksum, lambda *_: None
    checkpoint.TINY = SMALLER
    flags = {"precision": "fp32", "fsdp": fsdp, "resume": resume}
    train_sft.main(train_sft.SftConfig(out=str(folder / "sft"), **SFT, **flags), world)
    init = folder.parent / "start" / "step-2"
    train_grpo.main(
        train_grpo.GrpoConfig(init=str(init), out=str(folder / "rl"), **GRPO, **flags), world
    )


def _process(rank: int, size: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = init_distributed()
    train(folder / "sharded", world, fsdp=True)
    init, out = str(folder / "pretrained"), str(folder / "bf16")
    train_grpo.main(
        train_grpo.GrpoConfig(init=init, out=out, fsdp=True, **(GRPO | PRETRAINED)), world
    )


def log(folder: Path) -> list[dict]:
    """Return the numbers of a run's log that do not depend on the machine."""
    kept = (
        "update",
        "loss",
        "reward",
        "grad_norm",
        "kl",
        "entropy",
        "ratio",
        "accuracy/evaluation",
    )
    return [
        {key: row[key] for key in kept if key in row} for row in read_log(folder / "metrics.jsonl")
    ]


def close(ours: list[dict], theirs: list[dict]) -> bool:
    return all(a == pytest.approx(b, rel=1e-4, abs=1e-5) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_sharded_training_equals_whole_training(size, tmp_path, free_port, monkeypatch, undrawn):
    """Log, weights and optimizer; and a sharded run resumes unsharded on fewer processes."""
    for module, name in ((strategies, "score_response"), (plots, "save"), (checkpoint, "TINY")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back what `train` patches
    checkpoint.TINY = SMALLER
    make_pretrained(tmp_path / "pretrained", "qwen3", vocab_size=300)  # rows that no token has
    train_sft.main(
        train_sft.SftConfig(out=str(tmp_path / "start"), **(SFT | {"updates": 2, "save_every": 1})),
        ONE,
    )
    start_processes(_process, (size, free_port, tmp_path), size)
    train(tmp_path / "whole", ONE, fsdp=False)
    for stage in ("sft", "rl"):
        assert close(log(tmp_path / "sharded" / stage), log(tmp_path / "whole" / stage)), stage
        last = [tmp_path / name / stage / "step-3" for name in ("sharded", "whole")]
        ours, theirs = (load_model(folder)[0] for folder in last)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)
        ours, theirs = (torch.load(folder / "training_state.pt")["state"] for folder in last)
        assert ours.keys() == theirs.keys()
        for i in ours:
            assert not isinstance(ours[i]["exp_avg"], DTensor)
            torch.testing.assert_close(
                ours[i]["exp_avg"], theirs[i]["exp_avg"], rtol=1e-2, atol=1e-5
            )
    assert all(row["grad_norm"] > 0 for row in log(tmp_path / "whole" / "rl")), (
        "the test needs gradients that are not zero"
    )
    for stage in ("sft", "rl"):
        shutil.rmtree(tmp_path / "sharded" / stage / "step-3")
    train(tmp_path / "sharded", ONE, fsdp=False, resume=True)
    for stage in ("sft", "rl"):
        assert close(log(tmp_path / "sharded" / stage), log(tmp_path / "whole" / stage)), stage
    init, out = str(tmp_path / "pretrained"), str(tmp_path / "bf16 whole")
    train_grpo.main(train_grpo.GrpoConfig(init=init, out=out, **(GRPO | PRETRAINED)), ONE)
    ours, theirs = log(tmp_path / "bf16")[0], log(tmp_path / "bf16 whole")[0]
    assert ours == pytest.approx(theirs, rel=0.03, abs=1e-3), "equal up to the rounding of bf16"


def test_sharding_is_refused_where_it_makes_no_sense(tmp_path, monkeypatch, capsys, pretrained):
    monkeypatch.chdir(tmp_path)
    assert "--fsdp needs several" in refusal(
        lambda: train_sft.main(train_sft.SftConfig(fsdp=True), ONE), capsys
    )
    config = train_grpo.GrpoConfig(init=str(pretrained), fsdp=True)
    two = World(0, 2, torch.device("cpu"))
    assert "--lora 0" in refusal(lambda: train_grpo.main(config, two), capsys)
