"""Fused CPU kernels, from kernels.c: built once a process, in seconds, where there is a C compiler.

Between its matrix products a decoding step of a small model is a hundred operations of microseconds
each, and attention multiplies thousands of vectors by small matrices, which BLAS is slow at. They
take a quarter of training, too. Without a compiler and on a GPU the same formulas run as PyTorch's
operations; tests compare the two.
"""

import ctypes
import os
import subprocess
import tempfile
import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lib.flags import warn

Rope = tuple[Tensor, Tensor]  # cos and sin of the tokens' rotations, (N, d/2) each
# Sums may be reordered, so that they vectorise, and nothing is infinite. -ffast-math would also
# make every thread that loads the library flush denormals to zero.
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros "
FLAGS += "-fassociative-math -ffinite-math-only -shared -fPIC"
libraries: dict[tuple, ctypes.CDLL | None] = {}  # by dtype and head_dim; a None ends the use of all
one_build = threading.Lock()  # one thread builds, the others wait for it
PACKS = hasattr(torch.ops.mkldnn, "_linear_pointwise")
PACKS = PACKS and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # not by a CPU without AVX512
packed_weights = WeakIdKeyDictionary()  # of oneDNN, by the weight that they are made of
Int, Float, Pointer = [ctypes.c_long], [ctypes.c_float], [ctypes.c_void_p]
ELEMENTWISE = {  # numbers, then a letter for each tensor: f for float, l for long, r for real
    "add_rms_norm": (Int * 2 + Float, "frffr"),
    "add_rms_norm_backward": (Int * 2 + Float, "fffrfrf"),
    "swiglu": (Int * 2, "rr"),
    "swiglu_backward": (Int * 2, "rrr"),
    "block_logits": (Int * 3 + Float, "rf"),
    "token_logps": (Int * 2 + Float, "rlffff"),
    "token_logps_backward": (Int * 2 + Float, "rlfffr"),
}
ATTENTION = {"attend": (Int * 7, "rfflrrrrr"), "packed": (Int * 4, "lrffrff")}
ATTENTION["packed_backward"] = (Int * 5, "lrffffrr")


def apply_to(x: Tensor, head_dim: int = 0) -> bool:
    """Whether the kernels replace PyTorch's operations on x: with `head_dim` those of attention."""
    known = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    return known and available() and library(x.dtype, head_dim) is not None


def available() -> bool:
    """Whether a C compiler has built all that it was asked for."""
    return library(torch.float32) is not None and None not in libraries.values()


def library(dtype: torch.dtype, head_dim: int = 0) -> ctypes.CDLL | None:
    """Return the kernels for fp32 or bf16: with `head_dim` those of attention, else the others.

    Return None if building them fails, and say so.
    """
    key = dtype, head_dim
    if key not in libraries:
        with one_build:
            if key not in libraries:
                libraries[key] = build(*key)
    return libraries[key]


def build(dtype: torch.dtype, head_dim: int) -> ctypes.CDLL | None:
    """Compile kernels.c and load it; return None if there is no compiler that can."""
    options = ["-DBF16"] * (dtype == torch.bfloat16) + [f"-DHEAD_DIM={head_dim}"] * (head_dim > 0)
    source = str(Path(__file__).with_name("kernels.c"))
    with tempfile.TemporaryDirectory() as folder:
        compiler, file = os.environ.get("CC") or "cc", f"{folder}/kernels.so"
        command = [*compiler.split(), *FLAGS.split(), *options, source, "-o", file]
        try:
            # In a group of its own: Ctrl-C, which a run survives, would end the compiler
            subprocess.run(command, check=True, capture_output=True, text=True, process_group=0)
            kernels = ctypes.CDLL(file)
        except (OSError, subprocess.CalledProcessError) as error:
            why = getattr(error, "stderr", "") or str(error)
            warn(f"{compiler} cannot build the CPU's kernels, PyTorch serves, slower: {why[:300]}")
            return None
    types = {"f": torch.float32, "l": torch.int64, "r": dtype}
    for name, (numbers, kinds) in (ATTENTION if head_dim else ELEMENTWISE).items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = numbers + Pointer * len(kinds), None
        function.dtypes = [types[kind] for kind in kinds]
    return kernels


def call(function, numbers: tuple, *tensors: Tensor) -> None:
    """Call a function of kernels.c.

    C takes any bytes, so tensors have to be contiguous and of the types that its signature says.
    """
    given = [x.dtype if x.is_contiguous() else "not contiguous" for x in tensors]
    assert given == function.dtypes, f"{function.__name__} takes {function.dtypes}, not {given}"
    function(*numbers, *[x.data_ptr() for x in tensors])


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out = torch.empty_like(x), torch.empty_like(added)
        function = library(added.dtype).add_rms_norm
        call(function, (*x.shape, eps), x, added, weight, total, out)
        ctx.save_for_backward(total, weight)
        ctx.eps = eps
        return total, out

    @staticmethod
    def backward(ctx, d_total: Tensor, d_out: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        total, weight = ctx.saved_tensors
        d_total, d_out = d_total.contiguous(), d_out.contiguous()
        d_x, d_added = torch.empty_like(total), torch.empty_like(d_out)
        d_weight = torch.zeros_like(weight)
        tensors = total, weight, d_total, d_out, d_x, d_added, d_weight
        call(library(d_out.dtype).add_rms_norm_backward, (*total.shape, ctx.eps), *tensors)
        return d_x, d_added, d_weight, None


def add_rms_norm(added: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + added (N, D) in fp32, and that normalised, in the dtype of `added`.

    Without gradients x is overwritten.
    """
    if torch.is_grad_enabled():
        return AddRMSNorm.apply(x, added, weight, eps)
    out = torch.empty_like(added)
    call(library(added.dtype).add_rms_norm, (*x.shape, eps), x, added, weight, x, out)
    return x, out


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(gate_up: Tensor) -> Tensor:
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        call(library(gate_up.dtype).swiglu, out.shape, gate_up, out)
        return out

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> Tensor:
        (gate_up,), d_out = ctx.saved_tensors, d_out.contiguous()
        d_gate_up = torch.empty_like(gate_up)
        function = library(gate_up.dtype).swiglu_backward
        call(function, d_out.shape, gate_up, d_out, d_gate_up)
        return d_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu of the first half of gate_up (N, 2 I) times the second, (N, I)."""
    return SwiGLU.apply(gate_up) if torch.is_grad_enabled() else SwiGLU.forward(gate_up)


def packs(weight: Tensor) -> bool:
    """Whether `linear` uses a packed copy of this weight: frozen, bf16, CPU, no gradients."""
    frozen = isinstance(weight, torch.nn.Parameter) and not weight.requires_grad
    on_cpu = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return frozen and on_cpu and PACKS and not torch.is_grad_enabled()


def pack(weight: Tensor) -> Tensor:
    """Return a weight in oneDNN's layout.

    Otherwise it lays bf16 weights out anew for each product, which takes as long as 20 rows of it.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias as F.linear does, by a packed copy of the weight where it may."""
    if not packs(weight):
        return F.linear(x, weight, bias)
    if weight not in packed_weights:
        packed_weights[weight] = pack(weight)
    return packed_linear(x, packed_weights[weight], bias)


def block_logits(logits: Tensor, temperature: float, size: int) -> Tensor:
    """Return what fused.block_logits does."""
    (n, V), logits = logits.shape, logits.contiguous()
    out = torch.empty(n, -(-V // size))
    call(library(logits.dtype).block_logits, (n, V, size, temperature), logits, out)
    return out


class TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Return log-probs (n,) of the targets (n,) by logits (n, V), and entropies (n,)."""
        logits, targets = logits.contiguous(), targets.contiguous()
        logps, entropies, tops, norms = (torch.empty(len(logits)) for _ in range(4))
        tensors = logits, targets, logps, entropies, tops, norms
        call(library(logits.dtype).token_logps, (*logits.shape, temperature), *tensors)
        ctx.save_for_backward(logits, targets, tops, norms)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, d_logps: Tensor, _) -> tuple[Tensor, None, None]:
        logits, *others = ctx.saved_tensors
        d_logits = torch.empty_like(logits)
        tensors = logits, *others, d_logps.contiguous(), d_logits
        function = library(logits.dtype).token_logps_backward
        call(function, (*logits.shape, ctx.temperature), *tensors)
        return d_logits, None, None


token_logps = TokenLogps.apply


def attend(
    qkv: Tensor, rope: Rope, t: int, P: int, prompt_lengths: Tensor, *cached: Tensor
) -> Tensor:
    """Attend to a KV cache of P groups in a step that stores response token t: see kernels.c.

    qkv (P * G, H + 2 K, d), rope (P * G, d / 2) each -> (P * G, H * d). What is cached may have
    room for more groups: prompt_lengths (P',), keys and values of the prompts (P', K, Tp, d) each,
    then of the responses (P' * G, K, T, d).
    """
    rows, heads, d = qkv.shape
    (_, K, Tp, _), T = cached[0].shape, cached[2].shape[2]
    H = heads - 2 * K
    out = qkv.new_empty(rows, H * d)
    tensors = (qkv, *rope, prompt_lengths, *cached, out)
    call(library(qkv.dtype, d).attend, (P, rows // P, H, K, Tp, T, t), *tensors)
    return out


class PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, segments, K: int, max_keys: int) -> Tensor:
        N, heads, d = qkv.shape
        H = heads - 2 * K
        out, top, total = qkv.new_empty(N, H * d), cos.new_empty(N, H), cos.new_empty(N, H)
        tensors = segments, qkv, cos, sin, out, top, total
        call(library(qkv.dtype, d).packed, (len(segments), H, K, max_keys), *tensors)
        ctx.save_for_backward(segments, qkv, cos, sin, top, total)
        ctx.sizes = N, len(segments), H, K, max_keys
        return out

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        segments, qkv, *others = ctx.saved_tensors
        d_qkv, d_out = torch.empty_like(qkv), d_out.contiguous()
        function = library(qkv.dtype, qkv.shape[2]).packed_backward
        call(function, ctx.sizes, segments, qkv, *others, d_out, d_qkv)
        return d_qkv, *[None] * 5


def packed_attention(qkv: Tensor, rope: Rope, segments: Tensor, K: int, max_keys: int) -> Tensor:
    """Attend in a packed batch: see kernels.c.

    qkv (N, H + 2 K, d), segments (S, 5) of at most `max_keys` keys -> (N, H * d)
    """
    return PackedAttention.apply(qkv, *rope, segments, K, max_keys)
