"""Small operations that are one kernel each on a GPU, compiled by torch.compile.

Between its matrix products a layer is some twenty operations on little data. Launching each as a
kernel of its own takes longer than reading the weights. On the CPU lib/kernels.py serves; without
Triton or a C compiler these functions run as they stand here, as PyTorch's operations.
"""

import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import kernels
from lib.flags import warn

ADVICE = r"\s*(Online softmax is disabled on the fly|TensorFloat32 tensor cores .* not enabled)"


@functools.cache
def has_triton() -> bool:
    """Whether torch.compile works on this machine's GPU: it needs Triton and a C compiler."""
    if importlib.util.find_spec("triton") is None:
        return False
    # Compile in this process: a signal to its whole group, as of `timeout` or a batch system, would
    # kill compiling processes, for whose answer a run would wait forever (pytorch#189290). Since
    # 2.12 the setting holds in this thread alone; the variable, read at the import, in all.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    from torch._inductor import config  # takes a second to import

    config.compile_threads = 1
    try:
        torch.compile(torch.neg)(torch.zeros(2, device="cuda"))
        return True
    except Exception as error:  # dozens of kinds
        warn(f"torch.compile does not work, PyTorch's operations serve, slower: {str(error)[:300]}")
        return False


@functools.cache
def compiled(function: Callable, every_size: bool = False) -> Callable:
    """Compile a function for any first dimension of its tensors, or for `every_size` of theirs.

    The other dimensions are the model's. A kernel that knows them reads 16 bytes at a time; one
    that does not, one number, after a division of 64 bits for its place. PyTorch compiles anew for
    gradients, other dtypes and a first dimension of 1.
    """
    warnings.filterwarnings("ignore", ADVICE, UserWarning)  # for good: no user could follow these
    logging.getLogger("torch.utils._sympy.interp").setLevel(logging.ERROR)  # it raises errors, too
    call = torch.compile(function, dynamic=every_size or None)

    def with_any_first(x: Tensor, *others):
        for tensor in (x, *(y for y in others if isinstance(y, Tensor) and y.ndim > 1)):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return call(x, *others)

    return call if every_size else with_any_first


def fuse(function: Callable, every_size: bool = False, kernel: Callable | None = None) -> Callable:
    """Compile a pure function of tensors on a GPU; call `kernel` for it on the CPU.

    The first tensor says where it runs.
    """

    @functools.wraps(function)
    def call(x: Tensor, *others):
        if x.is_cuda and has_triton():
            return compiled(function, every_size)(x, *others)
        return (kernel if kernel and kernels.apply_to(x) else function)(x, *others)

    return call


@fuse
def split_heads(
    qkv: Tensor, cos: Tensor, sin: Tensor, H: int, K: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Split qkv (N, H + 2 K, d) into rotated queries (N, H, d), rotated keys and values (N, K, d).

    The pairs (x[i], x[i + d/2]) of a head are rotated in fp32. All are returned in `dtype`.
    """
    cos, sin = cos[:, None], sin[:, None]
    qk, v = qkv.split((H + K, K), 1)
    a, b = qk.chunk(2, -1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(dtype)
    return *rotated.split((H, K), 1), v.to(dtype)


@functools.partial(fuse, kernel=kernels.add_rms_norm)
def add_rms_norm(added: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + added (N, D) in fp32, and that normalised, in the dtype of `added`.

    On the CPU x may be overwritten where there are no gradients.
    """
    x = x + added
    return x, F.rms_norm(x, weight.shape, weight, eps).to(added.dtype)


@functools.partial(fuse, every_size=True)  # queries have more heads than keys
def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise each head of x (N, heads, d) by itself, in fp32."""
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


@functools.partial(fuse, kernel=kernels.swiglu)
def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu of the first half of gate_up (N, 2 I) times the second, (N, I)."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


@functools.partial(fuse, every_size=True)  # of prompts and of what is read of the cache
def joint_softmax(
    to_prompt: Tensor,
    to_response: Tensor,
    prompt_bias: Tensor,
    response_bias: Tensor,
    scale: float,
    G: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the attention weights of one softmax over prompt and response, shaped as the scores.

    to_prompt (P, K, G * R, Tp), to_response (P * G, K, R, W), in fp32; the biases mask.
    """
    (P, K, rows, Tp), W = to_prompt.shape, to_response.shape[3]
    to_prompt = (to_prompt * scale + prompt_bias).view(P, K, G, rows // G, Tp)
    to_prompt = to_prompt.transpose(1, 2).reshape(P * G, K, rows // G, Tp)
    scores = torch.cat((to_prompt, to_response * scale + response_bias), -1)
    on_prompt, on_response = scores.softmax(-1).to(dtype).split((Tp, W), -1)
    on_prompt = on_prompt.reshape(P, G, K, rows // G, Tp).transpose(1, 2)
    return on_prompt.reshape(P, K, rows, Tp), on_response.contiguous()


@fuse
def join_softmaxes(
    on_prompt: Tensor, prompt_sums: Tensor, on_response: Tensor, response_sums: Tensor
) -> Tensor:
    """Weigh two attentions (P, G, H, d), (P * G, 1, H, d) by their sums' logs: (P * G, H * d).

    The logs are (P, H, G) and (P * G, H, 1), as flash-attn returns them.
    """
    B, _, H, d = on_response.shape
    prompt_sums = prompt_sums.transpose(1, 2).reshape(B, H)
    share = torch.sigmoid(prompt_sums - response_sums[..., 0])[..., None]
    mixed = share * on_prompt.reshape(B, H, d) + (1 - share) * on_response[:, 0]
    return mixed.to(on_response.dtype).reshape(B, H * d)


@functools.partial(fuse, kernel=kernels.block_logits)
def block_logits(logits: Tensor, temperature: float, size: int) -> Tensor:
    """Return the logits (B, n) of blocks of `size` tokens: log-sum-exps of theirs (B, V) / T."""
    padded = F.pad(logits / temperature, (0, -logits.shape[1] % size), value=-torch.inf)
    return padded.unflatten(1, (-1, size)).logsumexp(-1)


class LogitsInFp32(torch.autograd.Function):
    """Products of 16-bit hidden states (N, D) and weights (V, D) that a GPU does not round.

    bf16 logits would shift log-probs by up to 0.17. `gradient_of` is the weights in fp32, whose
    gradient is returned, so that it is summed over chunks of N in fp32; None if they are frozen.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, gradient_of: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx, d_logits: Tensor) -> tuple[Tensor | None, ...]:
        (hidden, weight), d_weight = ctx.saved_tensors, None
        d_logits = d_logits.to(hidden.dtype)
        if ctx.needs_input_grad[2]:
            d_weight = torch.mm(d_logits.t(), hidden, out_dtype=torch.float32)
        return torch.mm(d_logits, weight), None, d_weight
