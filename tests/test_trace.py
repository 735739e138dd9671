"""The trace counts hand-made cases exactly, and its tables hold what a model needs.

It pretends to have a GPU before torch is imported, so all is measured in a process of its own.
"""

import contextlib
import io
import itertools
import json
import os
import re
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from paper import no_cuda

pytestmark = pytest.mark.skipif(bool(no_cuda.why_not()), reason=no_cuda.why_not())
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def measured() -> dict:
    from conftest import printed_by  # here: it imports torch

    return json.loads(printed_by("measured"))


def test_kernels_bytes_and_flops(measured):
    """x (4, 8), w (16, 8), rows (3, 8) of a table in bf16, their numbers (3,) in int64."""
    assert measured["kernels"] == [
        ["mm", 2 * (4 * 8 + 16 * 8 + 4 * 16), 2 * 4 * 8 * 16],
        ["mm", 2 * (4 * 8 + 16 * 8) + 4 * 4 * 16, 2 * 4 * 8 * 16],  # to fp32
        ["addmm_", 2 * (4 * 8 + 16 * 8 + 2 * 4 * 16), 2 * 4 * 8 * 16],
        ["bmm", 2 * (2 * 3 * 4 + 2 * 4 * 5 + 2 * 3 * 5), 2 * 2 * 3 * 4 * 5],
        ["index_select", 8 * 3 + 2 * 2 * 3 * 8, 0],
        ["index_copy_", 8 * 3 + 2 * 2 * 3 * 8, 0],
        ["add", 2 * (4 * 8 + 8 + 4 * 8), 0],  # a row that is expanded is read once
        ["fill_", 2 * 4 * 8, 0],
        ["copy_", 2 * 2 * (2 * 3 * 5), 0],
        ["baddbmm", 2 * (2 * 3 * 4 + 2 * 4 * 5 + 2 * 2 * 3 * 5), 2 * 2 * 3 * 4 * 5],
    ]
    assert measured["seconds"] == [2.5e-6, 1.0, 2.0]  # of the smallest kernel, by bytes, by FLOPs


def test_memory_is_followed(measured):
    """Two tensors of 4,000 bytes, a view of the second, and the first one's end before it."""
    assert measured["live"] == [4000, 8000, 4000, 4000, 0]
    assert measured["peak"] == 8000


def test_a_compiled_region_is_one_kernel(measured):
    """x and y (4, 8) in fp32 go in, (4,) comes out; nothing is kept beside x and y."""
    assert measured["forward"] == [["region", 4 * (2 * 32 + 4), 0]]
    assert measured["kept"] == 4 * 4
    assert measured["backward"] == [["gradients", 4 * (2 * 32 + 4 + 2 * 32), 0]]
    assert measured["gradient_error"] == 0


def test_a_region_of_several_kernels_reads_as_often(measured):
    """The region above, if it were three."""
    read = 4 * 2 * 32
    assert measured["several"] == [["region", n, 0] for n in (read, read, read + 4 * 4)]


def test_flash_attention_is_one_kernel(measured):
    """q (2, 1, 4, 8), 8 of 16 entries of two caches (2, 16, 1, 8), k, v, output; sums (2, 4, 1)."""
    n_bytes = 2 * (64 + 2 * 2 * 8 * 8 + 2 * 2 * 8 + 64) + 4 * 2 + 4 * 2 * 4
    assert measured["flash"] == [["flash", n_bytes, 0]]


def test_tables(measured):
    tables = re.findall(r"(?:^\|.*\n)+", measured["printed"], re.MULTILINE)
    decoding, update = ([r.split(" | ") for r in t.splitlines()] for t in tables)
    assert all(len(row) == len(t[0]) for t in (decoding, update) for row in t[2:])
    kernels, of_layer = ([int(row[i]) for row in decoding[2:]] for i in (3, 7))
    assert len(kernels) == 8  # and those of two layers, the embedding, the head and sampling
    assert all(n > 2 * of_a_layer > 0 for n, of_a_layer in zip(kernels, of_layer))
    _, whole, whole_again, lora, lora_again, *_ = update[3]  # with and without checkpointing
    assert 0 < int(whole) < int(whole_again) < int(lora_again) and int(whole) < int(lora)
    assert int(lora) < int(lora_again)


@pytest.mark.parametrize("trained", ["all weights", "LoRA"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_a_layer_keeps_is_what_is_planned(trained, checkpointing, measured):
    kept, planned = measured["layer"][f"{trained}, {checkpointing}"]
    assert kept == pytest.approx(planned, rel=0.02)


def test_parts_of_memory(measured):
    """Of a model in fp32: 4 bytes a weight, 4 of its gradient, 8 of Adam's, sharded over 8."""
    from lib.attention import KVCache
    from lib.transformer import Transformer
    from paper.bench import SMALL

    whole, sharded, lora = measured["memory"]
    model = Transformer(SMALL.shape)
    n = sum(w.numel() for w in model.parameters())
    norms = sum(w.numel() for w in model.parameters() if w.ndim == 1 and len(w) == 32)
    in_bf16 = 2 * n + 2 * norms
    assert whole["weights"] == 4 * n + 2 * in_bf16 and sharded["weights"] == n / 2 + 2 * in_bf16
    assert (whole["optimizer"], sharded["optimizer"]) == (8 * n, n)
    trained = lora["optimizer"] / 2  # adapters: in fp32, in bf16 and, one of the two, scaled
    assert in_bf16 + 1.5 * trained < lora["weights"] < in_bf16 + 2 * trained
    cache = KVCache(model, SMALL.prompts, SMALL.group, SMALL.prompt_len, SMALL.new_tokens)
    cached = sum(x.nbytes for pair in cache.prompt_kv + cache.response_kv for x in pair) / 2
    assert whole["sampler"] == cached + measured["temporaries"]
    parts = [x for name, x in measured["update"].items() if name.startswith("GB: ")]
    assert parts[:2] == [sharded["weights"] / 1e9, n / 1e9] and parts[3] == n / 2 / 1e9
    assert parts[-1] == pytest.approx(sum(parts[:-1])) and all(parts)


def test_the_benchmark_starts_it(monkeypatch):
    from lib.distributed import World
    from paper.bench import BenchConfig, main

    def execv(path, command):
        raise SystemExit(" ".join(command[1:]))

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit, match=r"^-m paper\.trace --small$"):
        main(BenchConfig(trace=True, small=True), World(0, 1, None))


# ------------------------------------------------------------------------------------------------
# In the process of its own


def count(t, torch) -> dict:
    """Count hand-made steps."""
    at = {"device": t.GPU, "dtype": torch.bfloat16}
    x, w, table, out = (torch.zeros(n, 8, **at) for n in (4, 16, 1000, 1000))
    row, index = torch.zeros(8, **at), torch.zeros(3, dtype=torch.long, device=t.GPU)
    a, b = torch.zeros(2, 3, 4, **at), torch.zeros(2, 4, 5, **at)
    with t.Trace() as trace:
        y = torch.nn.functional.linear(x, w)
        torch.mm(x, w.t(), out_dtype=torch.float32)
        y.addmm_(x, w.t())
        product = torch.bmm(a, b)
        rows = table.index_select(0, index)
        out.index_copy_(0, index, rows)
        x + row.expand(4, 8)
        torch.empty(100, **at).view(10, 10)
        x.fill_(1)
        torch.baddbmm(product, a, b)
    found = {"kernels": trace.kernels}
    kernels = t.Kernel("", 1), t.Kernel("", t.BANDWIDTH), t.Kernel("", 1, 2 * t.FLOPS)
    found["seconds"] = [kernel.seconds for kernel in kernels]

    with t.Trace() as trace:
        live, weight = [], torch.zeros(1000, device=t.GPU)
    with t.Trace() as trace:
        first = torch.empty(1000, device=t.GPU)
        live.append(trace.live)
        second = first + weight
        live.append(trace.live)
        del first
        live.append(trace.live)
        view = second.view(10, 100)
        del second
        live.append(trace.live)
        del view
        live.append(trace.live)
    found |= {"live": live, "peak": trace.peak}

    def region(x, y):
        return (x * y).exp().sum(-1)

    x, y = (torch.zeros(4, 8, device=t.GPU, requires_grad=True) for _ in range(2))
    d_z = torch.ones(4, device=t.GPU)
    with t.Trace() as trace:
        z = t.compiled(region)(x, y)
        found |= {"forward": list(trace.kernels), "kept": trace.live}
        trace.kernels.clear()
        torch.autograd.grad(z, (x, y), d_z)
    t.IN_REGION["region"] = 3
    with t.Trace() as several:
        t.compiled(region)(x, y)
    return found | {"backward": trace.kernels, "several": several.kernels}


def count_flash(t, torch) -> list:
    """Count one call, of two rows."""
    shapes = (2, 1, 4, 8), (2, 16, 1, 8), (2, 1, 1, 8)
    q, cache, new = (torch.zeros(n, dtype=torch.bfloat16, device=t.GPU) for n in shapes)
    options = {"cache_seqlens": torch.zeros(2, dtype=torch.int32, device=t.GPU)}
    with t.Trace() as trace:
        t.flash_attn_with_kvcache(8, q, cache, cache, new, new, **options, return_softmax_lse=True)
    return trace.kernels


def gradient_error(t, torch) -> float:
    """Return how far a region's gradients are from PyTorch's, with data."""
    from lib.fused import add_rms_norm

    def loss_of(function):
        torch.manual_seed(0)
        x, added, weight = (torch.randn(n, requires_grad=True) for n in ((4, 8), (4, 8), (8,)))
        x_new, normed = function(x, added, weight, 1e-6)
        return torch.autograd.grad((x_new.sin() * normed).sum(), (x, added, weight))

    plain = add_rms_norm.__wrapped__
    pairs = zip(loss_of(plain), loss_of(t.compiled(plain)))
    return max(float((a - b).abs().max()) for a, b in pairs)


def kept_by_a_layer(t) -> dict:
    """Return the bytes that a layer of Qwen2.5-1.5B keeps of a token, and those planned."""
    found = {}
    for lora, checkpointing in itertools.product((False, True), repeat=2):
        kept, planned = [], []
        for layers in (1, 2):
            shape = replace(t.QWEN.shape, num_hidden_layers=layers, vocab_size=100)
            work = replace(t.QWEN, prompts=2, shape=shape)
            _, n_tokens, n_bytes = t.micro_batch(work, t.build(shape, lora), checkpointing)
            kept.append(n_bytes / n_tokens)
            planned.append(t.memory.activation_bytes(shape, t.RANK * lora, lora, checkpointing))
        name = f"{'LoRA' if lora else 'all weights'}, {checkpointing}"
        found[name] = kept[1] - kept[0], planned[1] - planned[0]
    return found


def measure() -> dict:
    sys.argv[1:], printed = ["--small"], io.StringIO()
    with contextlib.redirect_stdout(printed):
        t = SimpleNamespace(**runpy.run_module("paper.trace", run_name="__main__"))
    import torch

    with t.fake_mode:
        found = count(t, torch) | {"flash": count_flash(t, torch)}
    found |= {"gradient_error": gradient_error(t, torch), "printed": printed.getvalue()}
    found["layer"] = kept_by_a_layer(t)
    whole, lora = (t.build(t.SMALL.shape, lora) for lora in (False, True))
    ways = (whole, 1), (whole, 8), (lora, 1)
    found["memory"] = [t.memory_at_start(t.SMALL, *way) for way in ways]
    found["temporaries"] = t.decoding_step(t.SMALL, whole[1], "matmul")[0].peak
    found["update"] = t.update_numbers(t.SMALL, whole, 8, False)
    return found


if __name__ == "__main__":
    print(json.dumps(measure()))
