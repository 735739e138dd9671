"""The benchmark runs, its rows are complete, and its limits follow from bytes and FLOPs."""

import importlib.util
import json

import pytest
import torch

from lib.distributed import World
from lib.transformer import ModelConfig
from paper import bench
from paper.bench import BenchConfig, Machine, Ours, Work, main

ONE = World(0, 1, torch.device("cpu"))
SMALL = Work(ModelConfig(64, 32, 48, 2, tie_word_embeddings=False), 2, 3, 5, 4)


def machine(precision: str, bandwidth: float = 1e10, flops: float = 1e11) -> Machine:
    return Machine(ONE, precision, 1, bandwidth, flops)


def test_rows_and_plot(tmp_path, monkeypatch, capsys):
    tiny = {name: row for name, row in bench.ROWS.items() if "tiny" in name}
    monkeypatch.setattr(bench, "ROWS", tiny)  # at small sizes the others are the same
    monkeypatch.setattr(bench, "detect_dtype", lambda *_: "fp32")
    files = {"json": str(tmp_path / "b.json"), "plot": str(tmp_path / "p.png")}
    main(BenchConfig(rounds=1, small=True, **files), ONE)
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["rounds"] == 1 and f"torch {torch.__version__}" in found["versions"]
    assert all("TFLOP/s" in rates for rates in found["rates"].values()) and found["rates"]
    rows = {row["name"]: row for row in found["rows"]}
    assert {"cpu-tiny-rollout", "cpu-tiny-update"} <= rows.keys()
    rollout = rows["cpu-tiny-rollout"]
    assert rollout["ratio"] == pytest.approx(rollout["peer"] / rollout["ours"])
    assert 0 < rollout["of_limit"] < 1
    assert (rows["cpu-tiny-update"]["peer"] is not None) == bool(importlib.util.find_spec("trl"))
    assert (tmp_path / "p.png").stat().st_size > 10_000
    assert "cpu-tiny-update" in capsys.readouterr().out


def test_matrix_weights():
    """All weights but norms and biases; the embedding counts only where it is also the head."""
    model = Ours(SMALL, machine("fp32")).master
    matrices = sum(w.numel() for w in model.parameters() if w.ndim == 2)
    assert SMALL.matrix_weights == matrices - model.model.embed_tokens.weight.numel()


def test_decoding_is_limited_by_memory_or_by_arithmetic():
    """A step reads the weights, each group's prompt and each response's tokens so far, all once."""
    per_token = 2 * 2 * 2 * 8  # keys and values, layers, key heads, head size
    numbers = 0
    for step in range(1, SMALL.new_tokens):
        cached = SMALL.prompts * (SMALL.prompt_len + SMALL.group * step)
        numbers += SMALL.matrix_weights + cached * per_token
    by_memory = machine("bf16", 1e9, 1e18).decode_seconds(SMALL)
    assert by_memory == pytest.approx(2 * numbers / 1e9)
    flops = 2 * SMALL.matrix_weights * SMALL.prompts * SMALL.group * SMALL.new_tokens
    by_arithmetic = machine("bf16", 1e18, 1e9).decode_seconds(SMALL)
    assert by_arithmetic == pytest.approx(flops / 1e9)


def test_an_update_moves_the_weights():
    ours = Ours(SMALL, machine("bf16"), beta=0.05)
    before = ours.master.lm_head.weight.clone()
    ours.update()
    assert not torch.equal(before, ours.master.lm_head.weight)
    assert torch.equal(ours.policy.lm_head.weight, ours.master.lm_head.weight.bfloat16())
