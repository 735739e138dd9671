"""The transformer: weights of Qwen2, Qwen3 and Llama in Hugging Face format, on packed tokens.

The body never sees a padded batch. It maps N tokens, whatever sequences they belong to, to N hidden
states. Training, prefill and decoding differ only in `attend(layer, qkv, rope)`: lib/attention.py.

    hidden = model(tokens, positions, attend)         # (N,), (N,) -> (N, D)
    logits = model.logits(hidden)                     # (N, D) -> (N, V)

Sources: Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388), Llama 3 (arXiv 2407.21783). Module
names are those of transformers, but qkv_proj and gate_up_proj stack several of its matrices.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lib import fused, kernels
from lib.distributed import full_tensor
from lib.kernels import Rope

Attend = Callable[[int, Tensor, Rope], Tensor]  # layer, qkv (N, H + 2 K, d), rope -> (N, H * d)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's RoPE scaling, in the names of a Hugging Face config.json."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    rope_type: str = "llama3"


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
    head_dim: int = 0  # d; 0: hidden_size over heads
    model_type: str = "qwen2"  # qwen2: QKV biases; qwen3: normalised q and k; llama: neither
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        object.__setattr__(self, "head_dim", head_dim)

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """Return x + added (N, D) in fp32, and that normalised, in the dtype of `added`."""
        return fused.add_rms_norm(added, x, self.weight, self.eps)


class Linear(nn.Linear):
    """Several of a checkpoint's projections in one matrix, of `sizes` rows each."""

    def __init__(self, inputs: int, *sizes: int, bias: bool = False):
        super().__init__(inputs, sum(sizes), bias)
        self.sizes = sizes
        self.adapter: nn.Module | None = None  # set by lib/lora.py

    def forward(self, x: Tensor, dropout_key: int | None) -> Tensor:
        if self.adapter is not None and kernels.packs(self.weight):  # in sampling on the CPU
            return self.adapter.joint_product(x, self.weight, self.bias)
        out = kernels.linear(x, self.weight, self.bias)
        return out if self.adapter is None else self.adapter(x, out, dropout_key)


class HeadNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return fused.head_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.config, d = layer, config, config.head_dim
        sizes = config.num_attention_heads * d, config.kv_size, config.kv_size
        self.qkv_proj = Linear(config.hidden_size, *sizes, bias=config.model_type == "qwen2")
        self.o_proj = Linear(config.num_attention_heads * d, config.hidden_size)
        if config.model_type == "qwen3":
            self.q_norm = HeadNorm(d, config.rms_norm_eps)
            self.k_norm = HeadNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend, dropout_key: int | None) -> Tensor:
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.qkv_proj(x, dropout_key).unflatten(-1, (-1, self.config.head_dim))
        if self.config.model_type == "qwen3":
            q, k, v = qkv.split((H, K, K), 1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), 1)
        return self.o_proj(attend(self.layer, qkv, rope), dropout_key)


class MLP(nn.Module):
    def __init__(self, D: int, inner: int):
        super().__init__()
        self.gate_up_proj = Linear(D, inner, inner)
        self.down_proj = Linear(inner, D)

    def forward(self, x: Tensor, dropout_key: int | None) -> Tensor:
        gate_up = self.gate_up_proj(x, dropout_key)  # (N, 2 * inner)
        return self.down_proj(fused.swiglu(gate_up), dropout_key)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, added: Tensor, rope: Rope, attend: Attend, dropout_key: int | None
    ) -> tuple[Tensor, Tensor]:
        """Map the residual stream x (N, D), fp32, and what the first norm adds to it to the next x,
        and what the next block's first norm adds to that."""
        x, normed = self.input_layernorm(x, added)
        added = self.self_attn(normed, rope, attend, dropout_key)
        x, normed = self.post_attention_layernorm(x, added)
        return x, self.mlp(normed, dropout_key)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype: torch.dtype | None = None  # set by lib/fsdp.py, whose weights are fp32
        self.gradient_checkpointing = False  # keep only the blocks' inputs for the backward pass
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        # Only so many tokens have a probability: many checkpoints have rows for more (Qwen2.5)
        self.n_logits = config.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attend, dropout_key: int | None = None
    ) -> Tensor:
        """Return the final hidden states (N, D) of tokens (N,) at RoPE positions (N,)."""
        N = len(tokens)
        if extra := self.extra_rows(N):
            tokens, positions = F.pad(tokens, (0, extra)), F.pad(positions, (0, extra))
            attend = without_rows(attend, N, extra)
        added = self.model.embed_tokens(tokens)  # (N, D)
        x = torch.zeros_like(added, dtype=torch.float32)  # the residual stream, in fp32 always
        context = rope_table(positions, self.config), attend, dropout_key  # for each block
        for block in self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, added = checkpoint(block, x, added, *context, use_reentrant=False)
            else:
                x, added = block(x, added, *context)
        hidden = self.model.norm(x, added)[1]
        return hidden[:N] if extra else hidden  # FSDP warns of views

    def extra_rows(self, n: int) -> int:
        """Return how many rows fill n up to a multiple of 64 (below 256: of 8) in bf16 on the CPU.

        There oneDNN compiles each product anew for every number of rows, in a millisecond or two:
        the tiny model trains 10 to 25% faster by this, and what was compiled takes memory.
        """
        on_cpu = self.device.type == "cpu" and self.dtype == torch.bfloat16
        return -n % (64 if n >= 256 else 8) if on_cpu else 0

    def head_weight(self) -> Tensor:
        """Return the rows (V, D) of the head up to the tokenizer's last token."""
        weight = self.lm_head.weight
        return weight[: self.n_logits] if self.n_logits < len(weight) else weight

    def logits(
        self, hidden: Tensor, gradient_of: Tensor | None = None, in_fp32: bool = True
    ) -> Tensor:
        """Return the logits (N, V) of hidden states (N, D), V up to the tokenizer's last token.

        They are in fp32, or on the CPU with in_fp32=False in the weights' dtype. `gradient_of` is
        what takes the gradient of 16-bit weights on a GPU: fused.LogitsInFp32.
        """
        weight, extra = self.head_weight(), self.extra_rows(len(hidden))
        if hidden.is_cuda and hidden.dtype != torch.float32:
            return fused.LogitsInFp32.apply(hidden, weight.detach(), gradient_of)
        rows = F.pad(hidden, (0, 0, 0, extra)) if extra else hidden
        logits = kernels.linear(rows, weight)[: len(hidden)]
        return logits.float() if in_fp32 else logits


def without_rows(attend: Attend, n: int, extra: int) -> Attend:
    """Return an attention function for n rows and `extra` ones, which it leaves out."""

    def attend_to_n(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        out = attend(layer, qkv[:n], (rope[0][:n], rope[1][:n]))
        return F.pad(out, (0, 0, 0, extra))

    return attend_to_n


PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def part_names(name: str) -> list[str]:
    """Return a checkpoint's names for the matrices that are stacked in the one of this name."""
    last = name.rpartition(".")[2]
    return [name.removesuffix(last) + part for part in PARTS.get(last, (last,))]


def hf_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield a checkpoint's names and weights, as views (gathered if sharded), without adapters."""
    for name, module in model.named_modules():
        if ".adapter" in name or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        for kind, weight in module.named_parameters(recurse=False):
            pieces = full_tensor(weight.detach()).split(getattr(module, "sizes", len(weight)))
            for part, piece in zip(part_names(name), pieces):
                yield f"{part}.{kind}", piece


@torch.no_grad()
def init_weights(model: Transformer, generator: torch.Generator) -> None:
    """Draw normal weights, scaled down where they write to the residual stream (GPT-2).

    The first layer starts with heads that attend a fixed number of tokens back: finding them takes
    much of a small model's training, and all else builds on them (induction heads, arXiv
    2209.11895). Qwen2's query and key biases can express them: with length b in a rotated pair of
    frequency f, turned by f * back, the score b^2 cos(f * (distance - back)) peaks at `back`.
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
    first = model.model.layers[0].self_attn.qkv_proj
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    first.weight[: (H + K) * d].mul_(0.25)  # content must weigh little against distance
    q_bias, k_bias, _ = first.bias.view(-1, 2, d // 2).split((H, K, K))
    k_bias[:, 0, :pairs] = length
    for head, back in zip(q_bias, (1, 2, 3, 5)):
        head[0, :pairs] = length * torch.cos(frequencies * back)
        head[1, :pairs] = -length * torch.sin(frequencies * back)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Return the radians per position (d/2,) of the rotated pairs (RoFormer, arXiv 2104.09864).

    Llama 3.1's scaling slows those that turn less than `low_freq_factor` times over the original
    positions by `factor`, keeps those above `high_freq_factor` turns, and interpolates between.
    """
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** -(pairs / config.head_dim)
    if (scaling := config.rope_scaling) is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


@fused.fuse
def rope_table(positions: Tensor, config: ModelConfig) -> Rope:
    """Return cos and sin (N, d/2) of the angles by which tokens at positions (N,) are rotated."""
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def split_heads(qkv: Tensor, rope: Rope, config: ModelConfig, dtype=None) -> tuple[Tensor, ...]:
    """Return rotated queries (N, H, d), rotated keys and values (N, K, d), in `dtype` or qkv's."""
    H, K = config.num_attention_heads, config.num_key_value_heads
    return fused.split_heads(qkv, *rope, H, K, dtype or qkv.dtype)
