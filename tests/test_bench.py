"""The bench runs, its rows are complete, and its limits are what a step has to move."""

import importlib.util
import json

import pytest
import torch

from lib.distributed import World
from lib.transformer import ModelConfig
from paper.bench import BenchConfig, Machine, Ours, Rates, Work, main, matrix_weights

ONE = World(0, 1, torch.device("cpu"))
SMALL = Work(ModelConfig(64, 32, 48, 2, tie_word_embeddings=False), 2, 3, 5, 4)


def machine(precision: str) -> Machine:
    return Machine(ONE, precision, Rates(1e10, 1e11), 1)


def test_rows_and_plot(tmp_path, capsys):
    main(
        BenchConfig(
            rounds=1, small=True, json=str(tmp_path / "b.json"), plot=str(tmp_path / "p.png")
        ),
        ONE,
    )
    rows = {row["name"]: row for row in json.loads((tmp_path / "b.json").read_text())}
    assert {"cpu-tiny-rollout", "cpu-tiny-update"} <= rows.keys()
    rollout = rows["cpu-tiny-rollout"]
    assert (
        rollout["ratio"] == pytest.approx(rollout["peer"] / rollout["ours"])
        and 0 < rollout["of_limit"] < 1
    )
    assert (rows["cpu-tiny-update"]["peer"] is not None) == bool(importlib.util.find_spec("trl"))
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "cpu-tiny-update" in capsys.readouterr().out


def test_matrix_weights():
    """All weights but norms and biases; the embedding counts only where it is also the head."""
    model = Ours(SMALL, machine("fp32")).model
    matrices = sum(w.numel() for w in model.parameters() if w.ndim == 2)
    assert matrix_weights(SMALL.shape) == matrices - model.model.embed_tokens.weight.numel()


def test_decoding_is_limited_by_memory_or_by_arithmetic():
    """Step by step: weights once, each group's prompt once, each response's tokens so far."""
    per_token = 2 * 2 * 2 * 8  # keys and values, layers, key heads, head size
    numbers = 0
    for step in range(1, SMALL.new):
        numbers += (
            matrix_weights(SMALL.shape)
            + SMALL.prompts * (SMALL.prompt + SMALL.group * step) * per_token
        )
    assert Rates(1e9, 1e18).decode_seconds(SMALL, 2) == pytest.approx(2 * numbers / 1e9)
    operations = 2 * matrix_weights(SMALL.shape) * SMALL.prompts * SMALL.group * SMALL.new
    assert Rates(1e18, 1e9).decode_seconds(SMALL, 2) == pytest.approx(operations / 1e9)


def test_an_update_moves_the_weights():
    ours = Ours(SMALL, machine("bf16"), beta=0.05)
    before = ours.model.lm_head.weight.clone()
    ours.update()
    assert not torch.equal(before, ours.model.lm_head.weight)
    assert torch.equal(ours.policy.lm_head.weight, ours.model.lm_head.weight.bfloat16())
