"""The transformer: Qwen2 weights in Hugging Face format, on packed tokens.

The body never sees a padded batch. It maps N tokens, whoever they belong to, to N hidden states, and calls
`attend(layer, q, k, v)` wherever tokens look at one another. What differs between training, prefill and decoding
is only that function: `packed_attention` below, and the two in rollout.py.

    hidden = model(tokens, positions, attend)         # (N,), (N,) -> (N, D)
    logits = model.logits(hidden)                     # (N, D) -> (N, V)

Source: Qwen2 (arXiv 2407.10671); module names are those of transformers' Qwen2ForCausalLM, so that a state dict
is a Hugging Face checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:  # needs CUDA: requirements-gpu.txt
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (N, H, d), k, v (N, K, d) -> (N, H, d)


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, in the names of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int = 128  # D
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4  # H
    num_key_value_heads: int = 2  # K
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads  # d


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_width)
        self.v_proj = nn.Linear(width, kv_width)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        mixed = attend(self.layer, rotate(q, *rope), rotate(k, *rope), v)  # (N, H, d)
        return self.o_proj(mixed.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Final hidden states (N, D) of N tokens (N,) at the given RoPE positions (N,)."""
        x = self.model.embed_tokens(tokens)  # (N, D)
        rope = rope_tables(positions, self.config, x.dtype)
        for block in self.model.layers:
            x = block(x, rope, attend)
        return self.model.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)"""
        return self.lm_head(hidden)


def init_weights(model: Transformer, generator: torch.Generator) -> None:
    """Normal weights, those that write to the residual stream scaled down (GPT-2), and previous-token heads.

    Much of a small transformer's training goes into finding heads that look a fixed number of tokens back, on which
    everything else then builds (induction heads, arXiv 2209.11895). Qwen2's query and key biases can express such a
    head outright, so the first layer is born with them: with biases of length b in a rotated pair of frequency f,
    turned by f * back, the score b^2 cos(f * (distance - back)) is largest `back` tokens away.
    """
    config, std = model.config, 0.06
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(weight)
        elif weight.ndim == 2:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = 1 / math.sqrt(2 * config.num_hidden_layers) if residual else 1.0
            nn.init.normal_(weight, std=std * scale, generator=generator)

    pairs, length = 4, 5.0  # only the fastest pairs tell neighbouring tokens apart
    frequencies = rope_frequencies(config, weight.device)[:pairs]
    first = model.model.layers[0].self_attn
    with torch.no_grad():
        for projection in (first.q_proj, first.k_proj):  # content shall weigh little against distance
            projection.weight.mul_(0.25)
        first.k_proj.bias.view(-1, 2, config.head_dim // 2)[:, 0, :pairs] = length
        for head, back in zip(first.q_proj.bias.view(-1, 2, config.head_dim // 2), (1, 2, 3, 5)):
            head[0, :pairs] = length * torch.cos(frequencies * back)
            head[1, :pairs] = -length * torch.sin(frequencies * back)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position, (d/2,), of the rotated pairs. Source: RoFormer, arXiv 2104.09864."""
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    return config.rope_theta**-exponents


def rope_tables(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (N, 1, d/2) each, of the rotation angles at positions (N,)."""
    angles = positions[:, None, None].float() * rope_frequencies(config, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x (N, heads, d)."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ------------------------------------------------------------------------------------------------------------------
# Packed batches: prompts and their responses without padding, each prompt computed once for all its responses


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
    queries: Tensor  # (N,) where each token lies in the padded (S, Tq) layout of the attention
    keys: Tensor  # (S, Tk) indices into the N tokens, 0 where padded
    real: Tensor  # (S, Tk) which of the keys are not padding
    bias: Tensor  # (S, 1, Tq, Tk) 0 where a query may look, -inf where not
    sources: Tensor  # (M,) which token predicts each response token
    targets: Tensor  # (M,) the response tokens, in the order of the responses' own boolean mask


def pack(
    prompts: Tensor,
    prompt_lengths: Tensor,
    responses: Tensor,
    response_lengths: Tensor,
    parents: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Packed:
    """Pack prompts (P, Tp) and responses (B, Tr), both padded on the right, with `parents` (B,) the prompts' rows.

    `positions` (P, Tp) and (B, Tr), for RoPE, are consecutive unless given.
    """
    device, (P, Tp), (B, Tr) = prompts.device, prompts.shape, responses.shape
    prompt_mask = torch.arange(Tp, device=device) < prompt_lengths[:, None]  # (P, Tp)
    target_mask = torch.arange(Tr, device=device) < response_lengths[:, None]  # (B, Tr)
    read_mask = torch.arange(Tr, device=device) < response_lengths[:, None] - 1
    prompt_index = (prompt_mask.flatten().cumsum(0) - 1).view(P, Tp)
    n_prompt = prompt_mask.sum()
    read_index = (read_mask.flatten().cumsum(0) - 1).view(B, Tr) + n_prompt

    Tq, Tk = max(Tp, Tr), Tp + Tr
    if positions is None:
        after = prompt_lengths[parents][:, None]
        positions = torch.arange(Tp, device=device).expand(P, Tp), after + torch.arange(Tr, device=device)

    query_mask = torch.zeros(P + B, Tq, dtype=torch.bool, device=device)
    query_mask[:P, :Tp], query_mask[P:, :Tr] = prompt_mask, read_mask
    real = torch.zeros(P + B, Tk, dtype=torch.bool, device=device)
    real[:P, :Tp], real[P:] = prompt_mask, torch.cat((prompt_mask[parents], read_mask), 1)
    keys = torch.zeros(P + B, Tk, dtype=torch.long, device=device)
    keys[:P, :Tp], keys[P:] = prompt_index, torch.cat((prompt_index[parents], read_index), 1)
    keys *= real

    allowed = torch.zeros(P + B, Tq, Tk, dtype=torch.bool, device=device)
    causal = torch.ones(Tq, Tq, dtype=torch.bool, device=device).tril()
    allowed[:P, :, :Tp] = causal[:, :Tp]  # padded keys lie behind every real query
    allowed[P:, :, :Tp] = prompt_mask[parents][:, None]
    allowed[P:, :, Tp:] = causal[:, :Tr]
    bias = torch.zeros(allowed.shape, device=device).masked_fill(~allowed, -torch.inf)[:, None]

    last_prompt = prompt_index.gather(1, prompt_lengths[:, None] - 1)[parents]  # (B, 1)
    sources = torch.cat((last_prompt, read_index[:, :-1]), 1)[target_mask]
    return Packed(
        tokens=torch.cat((prompts[prompt_mask], responses[read_mask])),
        positions=torch.cat((positions[0][prompt_mask], positions[1][read_mask])),
        queries=query_mask.flatten().nonzero()[:, 0],
        keys=keys,
        real=real,
        bias=bias,
        sources=sources,
        targets=responses[target_mask],
    )


def packed_attention(batch: Packed) -> Attend:
    """The attention of a packed batch: flash-attn's on a GPU that has it, else PyTorch's on a padded layout."""
    if flash_attn_varlen_func is not None and batch.tokens.is_cuda:
        return flash_attention(batch)
    return padded_attention(batch)


def padded_attention(batch: Packed) -> Attend:
    S, _, Tq, Tk = batch.bias.shape

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _, H, d = q.shape
        padded = q.new_zeros(S * Tq, H, d).index_copy(0, batch.queries, q).view(S, Tq, H, d)
        k, v = (x.index_select(0, batch.keys.flatten()).view(S, Tk, -1, d).transpose(1, 2) for x in (k, v))
        out = F.scaled_dot_product_attention(padded.transpose(1, 2), k, v, batch.bias, enable_gqa=k.shape[1] != H)
        return out.transpose(1, 2).reshape(S * Tq, H, d).index_select(0, batch.queries)

    return attend


def flash_attention(batch: Packed) -> Attend:
    """The same without padding, in bf16, which the kernel needs.

    A segment's queries are the last of its keys (a response's keys begin with its prompt's), and the kernel aligns
    the causal mask to the end of both, so lengths are all it needs to know.
    """
    S, _, Tq, Tk = batch.bias.shape
    keys = batch.keys[batch.real]
    lengths = [torch.bincount(batch.queries // Tq, minlength=S), batch.real.sum(1)]
    starts = [F.pad(n.cumsum(0), (1, 0)).int() for n in lengths]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = (x.bfloat16() for x in (q, k.index_select(0, keys), v.index_select(0, keys)))
        return flash_attn_varlen_func(*half, *starts, Tq, Tk, causal=True).to(q.dtype)

    return attend


def response_log_probs(
    model: Transformer, batch: Packed, temperature: float = 1.0, chunk: int = 8192
) -> tuple[Tensor, Tensor]:
    """Log-probs (M,) of the response tokens at the temperature they were sampled with, and the entropies (M,).

    Logits are made for `chunk` tokens at a time and made again in the backward pass, so that memory does not grow
    with tokens x vocabulary. The entropies carry no gradient.
    """
    hidden = model(batch.tokens, batch.positions, packed_attention(batch)).index_select(0, batch.sources)

    def head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (model.logits(hidden).float() / temperature).log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(1, targets[:, None])[:, 0], entropy

    pieces = [
        checkpoint(head, h, t, use_reentrant=False) for h, t in zip(hidden.split(chunk), batch.targets.split(chunk))
    ]
    log_probs, entropies = (torch.cat(x) for x in zip(*pieces))
    return log_probs, entropies
