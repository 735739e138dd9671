"""Packed batches: prompts and their responses without padding, each prompt computed once for all its responses.

    batch = pack(prompts, prompt_lengths, responses, response_lengths, parents)
    log_probs, entropies = response_log_probs(model, batch, temperature, entropy=True)

N tokens lie one after the other in one row; `packed_attention` sees to it that each looks only at those it may.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from model import PRECISIONS, Attend, ModelConfig, Rope, Transformer, split_heads, trained
from runtime import in_threads, is_sharded, n_threads

try:  # needs CUDA: requirements-gpu.txt
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

Item, Result = TypeVar("Item"), TypeVar("Result")


def pad(rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token lists -> (B, T) padded on the right with zeros, and the lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    padded[torch.arange(padded.shape[1]) < lengths[:, None]] = torch.tensor([t for row in rows for t in row])
    return padded.to(device), lengths.to(device)


@dataclass
class Packed:
    """P prompts, then B responses, concatenated: N tokens in S = P + B segments.

    A prompt's tokens attend within the prompt, a response's to its prompt and to itself. The last token of a
    response predicts nothing, so it is no input: it is a target only.

        prompt [a b c], responses [x y] and [z]:   tokens  a b c x        (z is predicted, never read)
                                                   sources c  x  c        (indices 2 3 2)
                                                   targets x  y  z
    """

    tokens: Tensor  # (N,)
    positions: Tensor  # (N,)
    lengths: Tensor  # (S,) tokens of each segment
    parents: Tensor  # (B,) the prompt of each response
    sources: Tensor  # (M,) which token predicts each response token
    targets: Tensor  # (M,) the response tokens that are predicted, row by row


def pack(
    prompts: Tensor,
    prompt_lengths: Tensor,
    responses: Tensor,
    response_lengths: Tensor,
    parents: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
    scored: Tensor | None = None,
) -> Packed:
    """Pack prompts (P, Tp) and responses (B, Tr), both padded on the right, with `parents` (B,) the prompts' rows.

    `positions` (P, Tp) and (B, Tr), for RoPE, are consecutive unless given. Of each response the last `scored` (B,)
    tokens are targets, or all of them.
    """
    device, (P, Tp), (B, Tr) = prompts.device, prompts.shape, responses.shape
    prompt_mask = torch.arange(Tp, device=device) < prompt_lengths[:, None]  # (P, Tp)
    target_mask = torch.arange(Tr, device=device) < response_lengths[:, None]  # (B, Tr)
    read_mask = torch.arange(Tr, device=device) < response_lengths[:, None] - 1
    read_index = prompt_mask.sum() + (read_mask.flatten().cumsum(0) - 1).view(B, Tr)
    if positions is None:
        after = prompt_lengths[parents][:, None]
        positions = torch.arange(Tp, device=device).expand(P, Tp), after + torch.arange(Tr, device=device)

    if scored is not None:
        target_mask &= torch.arange(Tr, device=device) >= (response_lengths - scored)[:, None]
    last_prompt = (prompt_lengths.cumsum(0) - 1)[parents][:, None]  # (B, 1)
    return Packed(
        tokens=torch.cat((prompts[prompt_mask], responses[read_mask])),
        positions=torch.cat((positions[0][prompt_mask], positions[1][read_mask])),
        lengths=torch.cat((prompt_lengths, response_lengths - 1)),
        parents=parents,
        sources=torch.cat((last_prompt, read_index[:, :-1]), 1)[target_mask],
        targets=responses[target_mask],
    )


def pack_prompts(prompts: Tensor, lengths: Tensor) -> Packed:
    """Prompts (P, Tp) of the given lengths (P,), without responses."""
    none = lengths[:0]
    return pack(prompts, lengths, none[:, None], none, none)


def prompts_of_segments(batch: Packed) -> tuple[Tensor, Tensor, Tensor]:
    """Of each segment (S,): its first token, its prompt's first token, and how many tokens of a prompt it looks at."""
    starts = F.pad(batch.lengths.cumsum(0), (1, 0))[:-1]
    P = len(batch.lengths) - len(batch.parents)
    own = torch.zeros_like(starts[:P])
    return starts, torch.cat((own, starts[batch.parents])), torch.cat((own, batch.lengths[batch.parents]))


def segment_keys(batch: Packed) -> tuple[Tensor, Tensor]:
    """What each segment may look at: indices (S, Tk) into the N tokens, and how many of them count (S,).

    A response's keys are its prompt and then itself, so that in every segment the queries are the last of the keys.
    """
    starts, parents, before = prompts_of_segments(batch)
    n_keys = before + batch.lengths
    j = torch.arange(int(n_keys.max()), device=before.device)
    keys = torch.where(j < before[:, None], parents[:, None] + j, (starts - before)[:, None] + j)
    return keys.where(j < n_keys[:, None], 0), n_keys


def attention_kernel(model: Transformer) -> str:
    """What packed batches attend by: without padding our kernels on the CPU and varlen kernels, which need 16 bits, on
    a GPU; else PyTorch's attention on a padded layout."""
    if kernels.apply_to(model.lm_head.weight):
        return "kernels.c"
    if model.device.type != "cuda" or model.dtype == torch.float32:
        return "PyTorch on a padded layout"
    return "PyTorch's varlen kernel" if flash_attn_varlen_func is None else "flash-attn"


def packed_attention(batch: Packed, model: Transformer) -> Attend:
    """The attention of a packed batch."""
    ways = {"kernels.c": kernel_attention, "PyTorch on a padded layout": padded_attention}
    return ways.get(attention_kernel(model), varlen_attention)(batch, model.config)


def describe(model: Transformer) -> str:
    """How a working copy computes, in one line."""
    precision = next(name for name, dtype in PRECISIONS.items() if dtype == model.dtype)
    return f"Computing on {model.device.type} in {precision}, attention by {attention_kernel(model)}."


def kernel_attention(batch: Packed, config: ModelConfig) -> Attend:
    starts, parents, before = prompts_of_segments(batch)
    segments = torch.stack((starts, batch.lengths, parents, before), 1)
    longest = int((before + batch.lengths).max())

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        return kernels.packed_attention(qkv, rope, segments, config.num_key_value_heads, longest)

    return attend


def padded_attention(batch: Packed, config: ModelConfig) -> Attend:
    (keys, n_keys), S, Tq = segment_keys(batch), len(batch.lengths), int(batch.lengths.max())
    Tk = keys.shape[1]
    i, j = torch.arange(Tq, device=keys.device), torch.arange(Tk, device=keys.device)
    queries = (i < batch.lengths[:, None]).flatten().nonzero()[:, 0]  # (N,) places in the padded layout
    allowed = j <= i[:, None] + (n_keys - batch.lengths)[:, None, None]  # (S, Tq, Tk)
    bias = torch.zeros(allowed.shape, device=keys.device).masked_fill(~allowed, -torch.inf)[:, None]

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        q, k, v = split_heads(qkv, rope, config, torch.float32)  # CPUs are slow at small products in 16 bits
        H, d = q.shape[1:]
        padded = q.new_zeros(S * Tq, H, d).index_copy(0, queries, q).view(S, Tq, H, d)
        k, v = (x.index_select(0, keys.flatten()).view(S, Tk, -1, d).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, bias, enable_gqa=k.shape[1] != H)
        return out.transpose(1, 2).reshape(S * Tq, H * d).index_select(0, queries).to(qkv.dtype)

    return attend


@functools.cache
def torch_varlen() -> tuple[Callable, dict]:
    """PyTorch's own varlen kernel, and how it is told to be causal and to share key heads, which differs from release
    to release. Only GPUs have it, and it takes two seconds to import."""
    from torch.nn.attention.varlen import varlen_attn

    there = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in there else {"is_causal": True}
    return varlen_attn, causal | ({"enable_gqa": True} if "enable_gqa" in there else {})


def varlen_attention(batch: Packed, config: ModelConfig) -> Attend:
    """The same without padding. The kernels align the causal mask to the end of queries and keys."""
    keys, n_keys = segment_keys(batch)
    keys = keys[torch.arange(keys.shape[1], device=keys.device) < n_keys[:, None]]
    starts = [F.pad(n.cumsum(0), (1, 0)).int() for n in (batch.lengths, n_keys)]
    longest = [int(batch.lengths.max()), int(n_keys.max())]

    def attend(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        q, k, v = split_heads(qkv, rope, config)
        k, v = k.index_select(0, keys), v.index_select(0, keys)
        if flash_attn_varlen_func is not None:
            out = flash_attn_varlen_func(q, k, v, *starts, *longest, causal=True)
        else:
            kernel, options = torch_varlen()
            out = kernel(q, k, v, *starts, *longest, **options)
        return out.flatten(1)

    return attend


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Log-probs (N, V) at a temperature, for sampler and trainer alike."""
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)  # a copy is dear


def response_log_probs(
    model: Transformer,
    batch: Packed,
    temperature: float = 1.0,
    entropy: bool = False,
    dropout_key: int | None = None,
    largest: int = 2**27,
) -> tuple[Tensor, Tensor]:
    """Log-probs (M,) of the response tokens at the temperature they were sampled with, and the entropies (M,), which
    carry no gradient; (0,) unless asked for.

    At most `largest` logits are made at a time, and made again in the backward pass, so that memory does not grow
    with tokens x vocabulary.
    """
    chunk = max(1, largest // model.config.vocab_size)
    hidden = model(batch.tokens, batch.positions, packed_attention(batch, model), dropout_key)

    def head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = log_softmax(model.logits(hidden), temperature)
        log_probs = log_p.gather(1, targets[:, None])[:, 0]
        with torch.no_grad():  # last, since the backward pass makes again only what comes before
            return log_probs, -(log_p.exp() * log_p).sum(-1) if entropy else log_probs[:0]

    chunks = zip(hidden.index_select(0, batch.sources).split(chunk), batch.targets.split(chunk))
    log_probs, entropies = zip(*(checkpoint(head, h, t, use_reentrant=False) for h, t in chunks))
    return torch.cat(log_probs), torch.cat(entropies)


def add_gradients(
    model: Transformer, copy: Transformer, loss: Callable[[int, Item], tuple[Tensor, Result]], items: Sequence[Item]
) -> list[Result]:
    """Add the gradient of the summed losses of the numbered items to the model's, and return what `loss` has said of
    each (thread by thread, so not in the order of the items).

    The gradients are those of the working copy; they are summed in fp32, in an order that does not depend on timing.
    A sharded model computes itself, in passes that all processes do together, and sums over the processes as well.
    """
    if is_sharded(model):
        results = []
        for value, result in map(loss, range(len(items)), items):
            (value * dist.get_world_size()).backward()  # FSDP takes the mean over the processes
            results.append(result)
        return results

    weights, copied = trained(model), trained(copy)

    def share(numbers: range) -> tuple[list[Tensor], list[Result]]:
        total, results = [], []
        for i in numbers:
            value, result = loss(i, items[i])
            gradients = torch.autograd.grad(value, copied)
            results.append(result)
            if total:
                torch._foreach_add_(total, gradients)
            else:
                total = [gradient.float() for gradient in gradients]
        return total, results

    n, results = min(n_threads(model.device), len(items)), []
    for total, said in in_threads(share, [range(i, len(items), n) for i in range(n)], model.device):
        results += said
        for weight, gradient in zip(weights, total):
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return results
