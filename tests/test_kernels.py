"""The CPU kernels against the same formulas in PyTorch, values and gradients."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model

from lib import fused, kernels
from lib.attention import describe
from lib.packing import pack, pad, response_logps
from lib.policy import DTYPES, make_policy

needs_compiler = pytest.mark.skipif(not kernels.available(), reason="needs a C compiler")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("n", [1, 37])
def test_add_rms_norm(dtype, n):
    generator = torch.Generator().manual_seed(0)
    x, d_sum = (torch.randn(n, 40, generator=generator) for _ in range(2))
    added, d_out = (torch.randn(n, 40, generator=generator).to(dtype) for _ in range(2))
    weight = torch.rand(40, generator=generator) + 0.5
    inputs = [w.clone().requires_grad_() for w in (x, added, weight)]
    total, out = kernels.add_rms_norm(inputs[1], inputs[0], inputs[2], 1e-6)
    ours = torch.autograd.grad((total, out), inputs, (d_sum, d_out))
    expected = x + added
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        out.float(), F.rms_norm(expected, (40,), weight, 1e-6), atol=TOLERANCE[dtype], rtol=0.01
    )

    again = [w.clone().float().requires_grad_() for w in (x, added, weight)]
    total = again[0] + again[1]
    normed = F.rms_norm(total, (40,), again[2], 1e-6)
    theirs = torch.autograd.grad((total, normed), again, (d_sum, d_out.float()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.float(), b, atol=3 * TOLERANCE[dtype], rtol=0.01)

    with torch.no_grad():
        kept = x.clone()
        total, out_again = kernels.add_rms_norm(added, kept, weight, 1e-6)
    assert total is kept and torch.equal(total, expected) and torch.equal(out_again, out)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values())
def test_swiglu(dtype):
    """Take large values too: e^x neither overflows nor loses the sign."""
    gate = torch.cat((torch.linspace(-300, 300, 61), torch.linspace(-5, 5, 51))).to(dtype)
    up, d_out = (torch.linspace(-2, 2, len(gate)).to(dtype) for _ in range(2))
    gate_up = torch.stack((torch.cat((gate, up)), torch.cat((gate, -up)))).requires_grad_()
    out = kernels.swiglu(gate_up)
    (ours,) = torch.autograd.grad(out, gate_up, d_out.expand(2, -1))
    exact = gate_up.detach().float().requires_grad_()
    a, b = exact.chunk(2, -1)
    expected = F.silu(a) * b
    (theirs,) = torch.autograd.grad(expected, exact, d_out.float().expand(2, -1))
    for mine, other in ((out, expected), (ours, theirs)):
        torch.testing.assert_close(
            mine.float(), other, atol=TOLERANCE[dtype] / 10, rtol=TOLERANCE[dtype]
        )


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_token_logps(temperature, dtype):
    """Log-probs, entropies and gradients, with a token that is not allowed and large logits."""
    generator = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(37, 1000, generator=generator).to(dtype)
    logits[:, 7] = -1e30
    targets = torch.randint(8, 1000, (37,), generator=generator)
    d_logps = torch.randn(37, generator=generator)
    logits.requires_grad_()
    logps, entropies = kernels.token_logps(logits, targets, temperature)
    (ours,) = torch.autograd.grad(logps, logits, d_logps)
    log_p = (logits.double() / temperature).log_softmax(-1)
    expected = log_p.gather(1, targets[:, None])[:, 0]
    (theirs,) = torch.autograd.grad(expected, logits, d_logps.double())
    torch.testing.assert_close(logps.double(), expected, atol=2e-5, rtol=1e-6)
    torch.testing.assert_close(
        entropies.double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5 if dtype.itemsize == 4 else 4e-3)
    assert not entropies.requires_grad


@needs_compiler
@pytest.mark.parametrize("V", [512, 513, 1300])
def test_block_logits(V):
    logits = 9 * torch.randn(5, V, generator=torch.Generator().manual_seed(0))
    ours = kernels.block_logits(logits, 0.7, 512)
    expected = fused.block_logits.__wrapped__(logits, 0.7, 512)  # PyTorch's operations
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_swallowed(bad, dtype):
    """The kernels are compiled as if there were none."""
    logits = torch.zeros(3, 1300, dtype=dtype)
    logits[1, 700], logits[2, 5] = bad, -torch.inf
    logps, _ = kernels.token_logps(logits, torch.tensor([1, 2, 3]), 1.0)
    assert logps.isfinite().tolist() == [True, False, True]
    blocks = kernels.block_logits(logits, 1.0, 512)
    assert blocks.isfinite().tolist() == [[True] * 3, [True, False, True], [True] * 3]


@pytest.mark.skipif(not kernels.PACKS, reason="needs oneDNN")
def test_a_frozen_weight_is_kept_in_onednns_layout():
    """The bits of F.linear; what is trained is not kept, and what is gone is forgotten."""
    weight = torch.nn.Parameter(torch.randn(48, 32).bfloat16(), requires_grad=False)
    x, bias = torch.randn(5, 32).bfloat16(), torch.randn(48).bfloat16()
    before = len(kernels.packed_weights)
    with torch.no_grad():
        for b in (None, bias):
            assert torch.equal(kernels.linear(x, weight, b), F.linear(x, weight, b))
    assert len(kernels.packed_weights) == before + 1
    kernels.linear(x, torch.nn.Parameter(weight.clone()))
    kernels.linear(x, weight)  # with gradients
    del weight
    assert len(kernels.packed_weights) == before


@needs_compiler
@pytest.mark.parametrize("head_dim, heads", [(16, 4), (24, 2), (64, 6), (128, 2)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_the_same_without_a_compiler(precision, head_dim, heads, monkeypatch):
    """Also for tiles of queries of other sizes; one response has 70 tokens."""
    shape = {"head_dim": head_dim, "num_attention_heads": heads}
    model = make_policy(small_model(**shape), precision)
    responses = pad([[*range(3, 23)] * 3 + [*range(3, 13)], [7, 1]])
    batch = pack(*pad([[3, 4, 5], [4]]), *responses, torch.tensor([0, 1]))
    results = []
    for available in (True, False):
        monkeypatch.setattr("lib.kernels.available", lambda available=available: available)
        log_probs, _ = response_logps(model, batch)
        results.append((log_probs, *torch.autograd.grad(log_probs.sum(), list(model.parameters()))))
    for a, b in zip(*results):
        assert (a - b).norm() <= (1e-5 if precision == "fp32" else 0.03) * b.norm()


def test_describe_names_device_precision_and_back_end(monkeypatch):
    monkeypatch.setattr("lib.kernels.available", lambda: True)
    assert describe(small_model()) == "Computing on cpu in fp32, attention by kernels.c."
    monkeypatch.setattr("lib.kernels.available", lambda: False)
    line = describe(make_policy(small_model(), "bf16"))
    assert line == "Computing on cpu in bf16, attention by torch padded."


COMPILERS = {  # cc as a shell script, with REAL for the real one; what the line says
    "missing": ("", "cc"),
    "fails always": ("echo broken >&2; exit 1", "broken"),
    "fails in bf16": (
        'case "$*" in *BF16*) echo no __bf16 >&2; exit 1;; esac; REAL "$@"',
        "__bf16",
    ),
    "fails for attention": ('case "$*" in *HEAD_DIM*) exit 3;; esac; REAL "$@"', "cc"),
    "killed": ("kill -9 $$", "cc"),
}


@pytest.fixture
def unbuilt(monkeypatch):
    """Forget the kernels that were built, and afterwards those that were not."""
    monkeypatch.setattr(kernels, "libraries", {})
    monkeypatch.delenv("CC", raising=False)


@needs_compiler
@pytest.mark.parametrize("how", COMPILERS)
def test_whatever_the_compiler_does_pytorch_serves_and_one_line_says_so(
    how, unbuilt, tmp_path, monkeypatch, capsys
):
    script, says = COMPILERS[how]
    compiler, path = tmp_path / "cc", os.environ["PATH"]
    if script:
        compiler.write_text(f"#!/bin/sh\n{script.replace('REAL', shutil.which('cc'))}\n")
        compiler.chmod(0o755)
    model = small_model(num_hidden_layers=1)
    batch = pack(*pad([[3, 4, 5]]), *pad([[6, 7, 8, 9]]), torch.tensor([0]))
    monkeypatch.setenv("PATH", f"{tmp_path}:{path}" if "REAL" in script else str(tmp_path))
    logps = [response_logps(make_policy(model, name), batch)[0] for name in ("fp32", "bf16")]
    (line,) = capsys.readouterr().err.splitlines()
    assert "PyTorch serves" in line and says in line
    expected, _ = response_logps(model, batch)
    for logp, tolerance in zip(logps, (1e-5, 0.1)):
        torch.testing.assert_close(logp, expected, atol=tolerance, rtol=0.01)


@needs_compiler
def test_the_compiler_is_that_of_the_environment(unbuilt, monkeypatch, capsys):
    """So CC=false does without kernels, for one who suspects them."""
    monkeypatch.setenv("CC", "cc -O1")
    assert kernels.build(torch.float32, 0) is not None
    monkeypatch.setenv("CC", "false")
    assert not kernels.apply_to(torch.ones(3))
    assert "false cannot build the CPU's kernels" in capsys.readouterr().err


@needs_compiler
def test_tensors_of_another_type_end_in_an_error_and_not_in_a_crash():
    """C would read bytes as it was told, and beyond their end: of a bf16 residual stream, say."""
    x, weight = torch.ones(3, 40), torch.ones(40)
    with pytest.raises(AssertionError, match=r"add_rms_norm takes .*, not .*torch\.bfloat16"):
        kernels.add_rms_norm(x, x.bfloat16(), weight, 1e-6)
    with pytest.raises(AssertionError, match="not contiguous"):
        kernels.add_rms_norm(x, torch.ones(40, 3).t(), weight, 1e-6)
    with pytest.raises(AssertionError, match=r"token_logps takes .*, not .*torch\.int32"):
        kernels.token_logps(x, torch.zeros(3, dtype=torch.int32), 1.0)
    kernels.add_rms_norm(x, x.clone(), weight, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_left_to_pytorch(dtype):
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(fused.swiglu(x), fused.swiglu.__wrapped__(x))


@needs_compiler
def test_ctrl_c_does_not_end_the_compiler(unbuilt, tmp_path, monkeypatch):
    """A terminal sends it to a whole group of processes, and the run goes on to its save."""
    (tmp_path / "cc").write_text(f"""#!/bin/sh
cut -d" " -f5 /proc/$$/stat > {tmp_path}/group
exec {shutil.which("cc")} "$@"
""")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert kernels.build(torch.float32, 0) is not None
    assert int((tmp_path / "group").read_text()) != os.getpgrp()


def test_threads_that_need_a_library_at_once_build_it_once(unbuilt, monkeypatch):
    built = []

    def build(*key):
        time.sleep(0.2)
        built.append(key)

    monkeypatch.setattr(kernels, "build", build)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: kernels.library(torch.bfloat16), range(3)))
    kernels.library(torch.bfloat16, 0)
    assert built == [(torch.bfloat16, 0)]


@needs_compiler
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("head", range(3))  # a query, the key and the value
def test_what_is_not_finite_spreads(head, dtype, value):
    """A policy that has broken must not sample as if it had not."""
    N, d, t = 6, 32, 2
    torch.manual_seed(0)
    qkv, angles = torch.randn(N, 3, d).to(dtype), torch.randn(N, d // 2)
    qkv[2, head, 1] = value
    rope, segments = (angles.cos(), angles.sin()), torch.tensor([[0, N, 0, 0, 0]])
    out = kernels.packed_attention(qkv, rope, segments, 1, N)
    broken = ~out.isfinite().all(1)
    assert broken[2:].tolist() == [i == 2 or head > 0 for i in range(2, N)]
    assert head == 2 or not broken[:2].any()  # those before share a product with the value
    cached = [torch.zeros(n, 1, 4, d).to(dtype) for n in (1, 1, N, N)]
    out = kernels.attend(qkv, rope, t, 1, torch.tensor([4]), *cached)
    assert (~out.isfinite().all(1)).tolist() == [i == 2 for i in range(N)]
