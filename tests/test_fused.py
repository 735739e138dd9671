"""Functions that a GPU compiles, and how tokens are sampled from large vocabularies."""

import functools
import logging
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ROOT

from lib import fused, transformer
from lib.transformer import ModelConfig
from rollout import BLOCK, invert_cdf, sample_tokens

P, K, G, R, Tp, W, D = 2, 2, 3, 2, 5, 4, 8
EVERY_SIZE = ("head_norm", "joint_softmax")  # compiled for every size, not only of the first
FP32, BF16 = torch.float32, torch.bfloat16


def random(*shape: int, dtype=FP32) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def calls(n: int, dtype: torch.dtype) -> dict:
    """Return each function with arguments for n tokens or groups, those with a gradient first."""
    x = random(n, 3, D, dtype=dtype)
    table = random(n, D // 2), random(n, D // 2)
    scores = random(n, K, G * R, Tp), random(n * G, K, R, W), random(n, 1, 1, Tp), random(W)
    attentions = random(n, G, 4, D, dtype=dtype), random(n, 4, G)
    attentions += random(n * G, 1, 4, D, dtype=dtype), random(n * G, 4, 1)
    norm = random(n, D, dtype=dtype), random(n, D), random(D), 1e-6
    return {
        "rope_table": (transformer.rope_table, torch.arange(n), ModelConfig(5)),
        "split_heads": (fused.split_heads, x, *table, 1, 1, dtype),
        "add_rms_norm": (fused.add_rms_norm, *norm),
        "head_norm": (fused.head_norm, x, random(D), 1e-6),
        "swiglu": (fused.swiglu, random(n, 2 * D, dtype=dtype)),
        "joint_softmax": (fused.joint_softmax, *scores, 0.3, G, dtype),
        "join_softmaxes": (fused.join_softmaxes, *attentions),
        "block_logits": (fused.block_logits, random(n, 1300), 0.7, 512),
    }


def outputs(function, arguments: list) -> list[torch.Tensor]:
    """Return what a function returns and the gradients of the sum of its squares."""
    returned = function(*arguments)
    returned = [returned] if isinstance(returned, torch.Tensor) else list(returned)
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    if not inputs:
        return returned
    loss = sum(x.float().square().sum() for x in returned)
    return returned + list(torch.autograd.grad(loss, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", calls(2, FP32))
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled_functions_equal_themselves(name, dtype):
    """Values and gradients, for several numbers of tokens: by the CPU's inductor."""
    torch.manual_seed(0)
    for n in (3, 8, 5):
        function, *arguments = calls(n, dtype)[name]
        for x in arguments:
            if isinstance(x, torch.Tensor) and x.is_floating_point():
                x.requires_grad_(name in ("split_heads", "add_rms_norm", "head_norm", "swiglu"))
        eager = outputs(function.__wrapped__, arguments)
        compiled = outputs(fused.compiled(function.__wrapped__, name in EVERY_SIZE), arguments)
        assert [x.dtype for x in eager] == [x.dtype for x in compiled]
        for a, b in zip(eager, compiled, strict=True):  # compiled code rounds to bf16 less often
            scale = a.float().abs().max().item()
            bound = scale * (1e-6 if dtype == FP32 else 2**-6)
            torch.testing.assert_close(a, b, atol=bound, rtol=0)


@pytest.mark.parametrize("name", calls(2, FP32))
def test_one_kernel_serves_any_number_of_tokens_and_knows_the_other_sizes(name, monkeypatch):
    compile_, shapes = torch.compile, []

    def backend(graph, inputs):
        values = [x.meta["example_value"] for x in graph.graph.find_nodes(op="placeholder")]
        shapes.append(next((*x.shape, *x.stride()) for x in values if isinstance(x, torch.Tensor)))
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(compile_, backend=backend))
    function, every_size = calls(2, FP32)[name][0].__wrapped__, name in EVERY_SIZE
    compiled = fused.compiled.__wrapped__(function, every_size)
    for n in (7, 11, 9):  # no other size, which would be taken for the same
        compiled(*calls(n, FP32)[name][1:])
    (sizes,) = shapes  # and strides
    known = [isinstance(size, int) for size in sizes]
    assert known[0] is False and (every_size or all(known[1:]))


def test_nothing_is_compiled_on_the_cpu(monkeypatch):
    monkeypatch.setattr(fused, "has_triton", lambda: True)
    monkeypatch.setattr(fused, "compiled", lambda *_: pytest.fail("compiled"))
    assert fused.swiglu(random(3, 8)).shape == (3, 4)


def test_a_compiler_that_does_not_work_is_not_used(monkeypatch, capsys):
    """Triton alone is not enough: it builds its launchers by a C compiler."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.ones(2))

    def broken(function):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", broken)
    fused.has_triton.cache_clear()
    assert not fused.has_triton() and "no C compiler" in capsys.readouterr().err
    fused.has_triton.cache_clear()


COMPILES = """
from pathlib import Path
from types import SimpleNamespace
import torch
from lib import fused

of_the_cpu = {"compile": torch.compile, "neg": torch.neg, "zeros": lambda *_, **__: torch.ones(2)}
fused.torch = SimpleNamespace(**of_the_cpu)
fused.importlib = SimpleNamespace(util=SimpleNamespace(find_spec=str))
assert fused.has_triton()
from torch._inductor.async_compile import AsyncCompile
AsyncCompile.warm_pool()  # as compiling for a GPU does
print(*(path.read_text() for path in Path("/proc/self/task").glob("*/children")))
"""


@pytest.mark.slow
def test_compiling_leaves_no_process_that_a_signal_could_kill():
    command, options = [sys.executable, "-c", COMPILES], {"cwd": ROOT, "text": True}
    printed = subprocess.run(command, **options, check=True, stdout=subprocess.PIPE).stdout
    assert printed.split() == []


def test_compiling_silences_three_messages_and_no_other(monkeypatch):
    online = "Online softmax is disabled on the fly since Inductor decides to"
    tf32 = "TensorFloat32 tensor cores for matrix multiplication available but not enabled."
    texts = f"\n{online}", f"no: {online}", tf32

    def warn_of_all(_):
        for text in texts:
            warnings.warn(text, stacklevel=1)

    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fused.compiled(warn_of_all)(torch.ones(1))
    assert [str(warning.message) for warning in heard] == [texts[1]]
    levels = [logging.getLogger(f"torch.utils._sympy.{x}").level for x in ("interp", "functions")]
    assert levels == [logging.ERROR, logging.NOTSET]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("V", [BLOCK + 1, 3 * BLOCK, 3 * BLOCK - 200])
def test_a_large_vocabulary_is_sampled_by_blocks(V, temperature):
    """The tokens and log-probs of one CDF over everything, but for the edges between tokens."""
    torch.manual_seed(0)
    logits, uniforms = random(1, V).mul(1.5).expand(4000, V), (torch.arange(4000) + 0.5) / 4000
    tokens, logps = sample_tokens(logits, uniforms, temperature)
    expected, _, _ = invert_cdf(logits, uniforms, temperature)
    assert (tokens != expected).sum() <= 4
    log_p = (logits[0] / temperature).log_softmax(-1)
    torch.testing.assert_close(logps, log_p[tokens], atol=1e-5, rtol=0)
    assert tokens.unique().numel() > 100


def test_in_a_large_vocabulary_too_probability_zero_is_never_chosen():
    logits = torch.full((3, 4 * BLOCK), -torch.inf)
    chosen = [5, BLOCK + 7, 2 * BLOCK + 511]
    logits[:, chosen] = 0.0
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == chosen
    logits[0], logits[1, 2] = torch.nan, torch.inf
    tokens, logps = sample_tokens(logits, torch.full((3,), 0.5), 1.0)
    assert ((tokens >= 0) & (tokens < 4 * BLOCK)).all()
    assert logps.isfinite().tolist() == [False, False, True]
