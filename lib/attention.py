"""Attention: all back ends, for packed batches (training, prefill) and decoding with a KV cache.

    backend        packed batches                       a decoding step
    kernels.c      one C function, also backward        one C function
    flash-attn     flash_attn_varlen_func               flash_attn_with_kvcache
    torch varlen   PyTorch's varlen kernel              matrix products
    torch padded   scaled_dot_product_attention         matrix products

kernels.c serves the CPU. The varlen kernels need a GPU and 16 bits; flash-attn is used where it is
installed. torch padded serves everything else. Masking happens here, or in kernels.c.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import fused, kernels
from lib.policy import DTYPES
from lib.transformer import Attend, ModelConfig, Rope, Transformer, split_heads

if TYPE_CHECKING:
    from lib.packing import Packed

try:
    from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
except ImportError:
    flash_attn_varlen_func = flash_attn_with_kvcache = None


def attn_backend(model: Transformer) -> str:
    """Choose the back end by device, dtype and what is installed: a name of the table above."""
    example = torch.empty(0, dtype=model.dtype, device=model.device)
    if kernels.apply_to(example, model.config.head_dim):
        return "kernels.c"
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return "torch padded"
    return "torch varlen" if flash_attn_varlen_func is None else "flash-attn"


def decode_backend(model: Transformer) -> str:
    """Return the decoding side of the back end: "kernel", "flash" or "matmul"."""
    return {"kernels.c": "kernel", "flash-attn": "flash"}.get(attn_backend(model), "matmul")


def packed_attention(batch: "Packed", model: Transformer) -> Attend:
    """Return the attention function of a packed batch."""
    functions = {"kernels.c": kernel_attention, "torch padded": padded_attention}
    return functions.get(attn_backend(model), varlen_attention)(batch, model.config)


def describe(model: Transformer) -> str:
    """Say in one line how a model computes."""
    precision = next(name for name, dtype in DTYPES.items() if dtype == model.dtype)
    return f"Computing on {model.device.type} in {precision}, attention by {attn_backend(model)}."


def segment_table(batch: "Packed") -> Tensor:
    """Return (S, 5): each segment's first token and length, its prompt's, and its prefix's length.

    A response's keys are the prefix that all prompts share, then its prompt, then its own tokens.
    """
    starts = F.pad(batch.lengths.cumsum(0), (1, 0))[:-1]
    none = starts.new_zeros(len(starts) - len(batch.prompt_index))  # prompts have no prompt
    prompts = batch.prompt_index + (batch.shared > 0)
    prompt_starts = torch.cat((none, starts[prompts]))
    prompt_lengths = torch.cat((none, batch.lengths[prompts]))
    prefix = starts.clamp(max=batch.shared)  # which itself, the first segment, has none
    return torch.stack((starts, batch.lengths, prompt_starts, prompt_lengths, prefix), 1)


def kv_indices(batch: "Packed") -> tuple[Tensor, Tensor]:
    """Return each segment's keys as indices (S, Tk) into the N tokens, and how many count (S,).

    Its own come last, so the queries are always the last keys.
    """
    starts, lengths, prompt_starts, prompt_lengths, prefix = segment_table(batch).unbind(1)
    before = prefix + prompt_lengths
    n_keys = before + lengths
    j = torch.arange(int(n_keys.max()), device=starts.device)
    of_prompt = (prompt_starts - prefix)[:, None] + j
    own = (starts - before)[:, None] + j
    keys = torch.where(j < before[:, None], of_prompt, own)
    keys = torch.where(j < prefix[:, None], j, keys)
    return keys.where(j < n_keys[:, None], 0), n_keys


def kernel_attention(batch: "Packed", config: ModelConfig) -> Attend:
    """Attend by kernels.c, without padding."""
    segments = segment_table(batch)
    max_keys = int((segments[:, 1] + segments[:, 3] + segments[:, 4]).max())

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        return kernels.packed_attention(qkv, rope, segments, config.num_key_value_heads, max_keys)

    return attend


def padded_attention(batch: "Packed", config: ModelConfig) -> Attend:
    """Attend by PyTorch's kernel on segments that are padded to the longest."""
    (keys, n_keys), S, Tq = kv_indices(batch), len(batch.lengths), int(batch.lengths.max())
    i, j = (torch.arange(n, device=keys.device) for n in (Tq, keys.shape[1]))
    queries = (i < batch.lengths[:, None]).flatten().nonzero()[:, 0]  # (N,) into S * Tq
    allowed = j <= i[:, None] + (n_keys - batch.lengths)[:, None, None]  # (S, Tq, Tk)
    bias = torch.zeros(allowed.shape, device=keys.device).masked_fill(~allowed, -torch.inf)[:, None]

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        # In fp32: CPUs are slow at small products in 16 bits.
        q, k, v = split_heads(qkv, rope, config, torch.float32)
        H, d = q.shape[1:]
        q = q.new_zeros(S * Tq, H, d).index_copy(0, queries, q).view(S, Tq, H, d).transpose(1, 2)
        k, v = (x.index_select(0, keys.flatten()).unflatten(0, keys.shape) for x in (k, v))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (S, K, Tk, d)
        out = F.scaled_dot_product_attention(q, k, v, bias, enable_gqa=k.shape[1] != H)
        out = out.transpose(1, 2).reshape(S * Tq, H * d)
        return out.index_select(0, queries).to(qkv.dtype)  # (N, H * d)

    return attend


@functools.cache
def torch_varlen() -> tuple[Callable, dict]:
    """Return PyTorch's varlen kernel and its options, which differ between releases."""
    from torch.nn.attention.varlen import varlen_attn  # takes two seconds to import

    parameters = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    return varlen_attn, causal | ({"enable_gqa": True} if "enable_gqa" in parameters else {})


def varlen_attention(batch: "Packed", config: ModelConfig) -> Attend:
    """Attend by a varlen kernel, whose causal mask is aligned to the ends of queries and keys."""
    kernel, options = flash_attn_varlen_func, {"causal": True}
    if kernel is None:
        kernel, options = torch_varlen()
    keys, n_keys = kv_indices(batch)
    keys = keys[torch.arange(keys.shape[1], device=keys.device) < n_keys[:, None]]
    cu_seqlens_q = F.pad(batch.lengths.cumsum(0), (1, 0)).int()
    cu_seqlens_k = F.pad(n_keys.cumsum(0), (1, 0)).int()
    # At least 2: flash-attn reshapes queries of one token each, and a segment may have none.
    max_seqlens = max(2, int(batch.lengths.max())), int(n_keys.max())

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        q, k, v = split_heads(qkv, rope, config)
        k, v = k.index_select(0, keys), v.index_select(0, keys)
        return kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, *max_seqlens, **options).flatten(1)

    return attend


def cache_bytes(model: Transformer, groups: int, G: int, max_prompt_len: int, T: int) -> int:
    """Return what a KVCache of these sizes holds."""
    per_token = 2 * model.config.num_hidden_layers * model.config.kv_size * model.dtype.itemsize
    return groups * (max_prompt_len + G * T) * per_token


class KVCache:
    """Keys and values of up to P groups of G responses, for decoding; a prompt's are stored once.

    Responses have buffers of their own, in which all rows stand at the same step, so prompts of any
    length need no left padding. One softmax runs over both.
    """

    def __init__(self, model: Transformer, groups: int, G: int, max_prompt_len: int, T: int):
        self.config, self.groups, self.G = model.config, groups, G
        self.max_prompt_len, self.T, self.backend = max_prompt_len, T, decode_backend(model)
        K, d, device = self.config.num_key_value_heads, self.config.head_dim, model.device
        if self.backend == "flash":  # its check counts the heads that share a key head as queries
            T = max(T, self.config.num_attention_heads // K)
        self.n_bytes = cache_bytes(model, groups, G, max_prompt_len, T)
        options, layers = {"dtype": model.dtype, "device": device}, self.config.num_hidden_layers
        # The kernel reads valid entries only; the other back ends also read what they mask.
        new = torch.empty if self.backend == "kernel" else torch.zeros
        sizes = (groups, K, max_prompt_len, d), (groups * G, K, T, d)  # of keys, and of values
        pairs = [[(new(x, **options), new(x, **options)) for _ in range(layers)] for x in sizes]
        self.prompt_kv, self.response_kv = pairs  # by layer
        self.prompt_lengths = torch.zeros(groups, dtype=torch.long, device=device)  # (P,)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # response token read next

    def start(self, prompt_lengths: Tensor) -> None:
        """Begin with the prompts of these lengths (P,)."""
        self.P = len(prompt_lengths)
        self.prompt_lengths[: self.P] = prompt_lengths
        self.t.fill_(-1)

    def store_prompts(self, batch: "Packed", attend: Attend) -> Attend:
        """Wrap the attention of the packed prompts so that it stores their keys and values."""
        keys, n_keys = kv_indices(batch)
        keys, n_keys = keys[-self.P :], n_keys[-self.P :, None]
        real = torch.arange(keys.shape[1], device=keys.device) < n_keys  # (P, Tp)
        keys, real = keys[real], real.nonzero(as_tuple=True)

        def attend_and_store(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
            _, *keys_and_values = split_heads(qkv, rope, self.config)
            for stored, x in zip(self.prompt_kv[layer], keys_and_values):
                stored[: self.P].transpose(1, 2)[real] = x.index_select(0, keys)
            return attend(layer, qkv, rope)

        return attend_and_store

    def keep(self, groups: Tensor, rows: Tensor, t: int) -> None:
        """Keep the groups (P',) and their rows (P' * G,), of which `t` tokens are stored."""
        self.P = len(groups)
        for x in itertools.chain(*self.prompt_kv):
            x[: self.P] = x[groups]
        for x in itertools.chain(*self.response_kv):
            x[: len(rows), :, :t] = x[rows, :, :t]
        self.prompt_lengths[: self.P] = self.prompt_lengths[groups]

    def window_at(self, t: int) -> int:
        """Return how many response tokens the step at token t looks at, those to come masked.

        Matrix products look at all up to the next quarter of the buffer; the kernels go by lengths.
        """
        quarter = max(16, math.ceil(self.T / 4))
        return min(self.T, (t // quarter + 1) * quarter) if self.backend == "matmul" else self.T

    def start_step(self, t: int, window: int) -> Attend:
        """Return the attention of a step that reads response token `t`, on `window` cached ones.

        A captured step depends on the host's `window` alone: it reads the device's self.t, not `t`.
        """
        self.host_t, self.window = t, window
        if self.backend == "matmul":
            self.make_biases()
        if self.backend == "flash":  # which takes its lengths as int32
            B = self.P * self.G
            self.seqlens = self.prompt_lengths[: self.P].int(), self.t.int().expand(B).contiguous()
        return getattr(self, f"attend_by_{self.backend}")

    def make_biases(self) -> None:
        """Mask, for all layers of a step, what lies behind a prompt's end and behind self.t."""
        device = self.t.device
        lengths = self.prompt_lengths[: self.P, None]
        real = torch.arange(self.max_prompt_len, device=device) < lengths  # (P, Tp)
        bias = torch.zeros(real.shape, device=device).masked_fill(~real, -torch.inf)
        self.prompt_bias = bias[:, None, None]  # (P, 1, 1, Tp)
        later = torch.arange(self.window, device=device) > self.t
        zeros = torch.zeros(self.window, device=device)
        self.response_bias = zeros.masked_fill(later, -torch.inf)  # (W,)

    # Three back ends, equal to rounding. qkv (B, H + 2 K, d) of B = P * G rows -> (B, H * d)

    def attend_by_kernel(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """Rotate, store and attend in one C function."""
        cached = *self.prompt_kv[layer], *self.response_kv[layer]
        return kernels.attend(qkv, rope, self.host_t, self.P, self.prompt_lengths, *cached)

    def attend_by_matmul(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """Attend by PyTorch's matrix products, on any device."""
        q, *keys_and_values = split_heads(qkv, rope, self.config)
        (B, H, d), P, G, K = q.shape, self.P, self.G, self.config.num_key_value_heads
        R, Tp = H // K, self.max_prompt_len
        response_kv = [stored[:B] for stored in self.response_kv[layer]]
        for stored, x in zip(response_kv, keys_and_values):
            stored.index_copy_(2, self.t, x[:, :, None])
        prompt_k, prompt_v = (x[:P].flatten(0, 1) for x in self.prompt_kv[layer])  # (P * K, Tp, d)
        response_k, response_v = (x[:, :, : self.window].flatten(0, 1) for x in response_kv)

        # The R heads that share a key head are rows of one matrix, as are a prompt's G responses.
        by_group = q.view(P, G, K, R, d).transpose(1, 2).reshape(P * K, G * R, d)
        by_row = q.reshape(B * K, R, d)
        to_prompt = attention_scores(by_group, prompt_k).view(P, K, G * R, Tp)
        to_response = attention_scores(by_row, response_k).view(B, K, R, self.window)
        scores = to_prompt, to_response, self.prompt_bias, self.response_bias
        on_prompt, on_response = fused.joint_softmax(*scores, d**-0.5, G, q.dtype)
        mixed = torch.bmm(on_prompt.flatten(0, 1), prompt_v)
        mixed = mixed.view(P, K, G, R, d).transpose(1, 2).reshape(B * K, R, d)
        return mixed.baddbmm_(on_response.flatten(0, 1), response_v).view(B, H * d)

    def attend_by_flash(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """Attend by flash-attn to prompt and response, and join the softmaxes by their sums."""
        q, k, v = split_heads(qkv, rope, self.config)
        (B, H, d), P, G, (prompt_seqlens, t) = q.shape, self.P, self.G, self.seqlens
        prompt_kv = [x[:P].transpose(1, 2) for x in self.prompt_kv[layer]]  # (P, Tp, K, d)
        response_kv = [x[:B].transpose(1, 2) for x in self.response_kv[layer]]  # (B, T, K, d)
        attend = functools.partial(flash_attn_with_kvcache, return_softmax_lse=True)
        # (P, G, H, d), (P, H, G); then (B, 1, H, d), (B, H, 1), once k and v are stored at t
        of_prompt = attend(q.view(P, G, H, d), *prompt_kv, cache_seqlens=prompt_seqlens)
        responses = q[:, None], *response_kv, k[:, None], v[:, None]
        return fused.join_softmaxes(*of_prompt, *attend(*responses, cache_seqlens=t))


def attention_scores(q: Tensor, k: Tensor) -> Tensor:
    """Return the products (b, Tq, Tk) in fp32 of queries (b, Tq, d) and keys (b, Tk, d).

    Qwen2's biases push scores to ~100, where bf16 numbers lie 0.5 apart.
    """
    k = k.transpose(1, 2)
    if q.device.type == "cuda" and q.dtype != torch.float32:  # the CPU has no out_dtype
        return torch.bmm(q, k, out_dtype=torch.float32)
    return torch.bmm(q.float(), k.float())
