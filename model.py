"""The transformer: weights of Qwen2, Qwen3 and Llama in Hugging Face format, on packed tokens.

The body never sees a padded batch. It maps N tokens, whoever they belong to, to N hidden states, and calls
`attend(layer, qkv, rope)` wherever tokens look at one another. What differs between training, prefill and decoding
is only that function: `packed_attention` in packed.py, and those in rollout.py.

    hidden = model(tokens, positions, attend)         # (N,), (N,) -> (N, D)
    logits = model.logits(hidden)                     # (N, D) -> (N, V)

Sources: Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388), Llama 3 (arXiv 2407.21783). Module names are those of
transformers, but for two matrices that hold several of its own, one below the other: qkv_proj and gate_up_proj.
"""

import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from runtime import is_sharded, whole

Rope = tuple[Tensor, Tensor]  # cos and sin of the tokens' rotations, (N, d/2) each
Attend = Callable[[int, Tensor, Rope], Tensor]  # layer, qkv (N, H + 2 K, d) before rotation, rope -> (N, H * d)


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotations, in the names of a Hugging Face config.json."""

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
    model_type: str = "qwen2"  # qwen2: with biases; qwen3: queries and keys are normalised; llama: neither
    rope_scaling: RopeScaling | None = None

    def __post_init__(self):
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // self.num_attention_heads)

    @property
    def kv_size(self) -> int:
        return self.num_key_value_heads * self.head_dim


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added (N, D), in fp32, and the same normalised, in the type of `added`."""
        if kernels.apply_to(x):
            return kernels.add_rms_norm(x, added, self.weight, self.eps)
        x = x + added
        return x, F.rms_norm(x, (x.shape[-1],), self.weight, self.eps).to(added.dtype)


class Linear(nn.Linear):
    """Several projections of a checkpoint in one matrix, of `sizes` rows each, perhaps with LoRA adapters."""

    def __init__(self, inputs: int, *sizes: int, bias: bool = False):
        super().__init__(inputs, sum(sizes), bias)
        self.sizes = sizes
        self.adapter: nn.Module | None = None  # lora.py adds them

    def forward(self, x: Tensor, dropout_key: int | None) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        return out if self.adapter is None else out + self.adapter(x, dropout_key)


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head by itself, in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.config, d = layer, config, config.head_dim
        sizes = config.num_attention_heads * d, config.kv_size, config.kv_size
        self.qkv_proj = Linear(config.hidden_size, *sizes, bias=config.model_type == "qwen2")
        self.o_proj = Linear(config.num_attention_heads * d, config.hidden_size)
        if config.model_type == "qwen3":
            self.q_norm, self.k_norm = HeadNorm(d, config.rms_norm_eps), HeadNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend, dropout_key: int | None) -> Tensor:
        H, K = self.config.num_attention_heads, self.config.num_key_value_heads
        qkv = self.qkv_proj(x, dropout_key).unflatten(-1, (-1, self.config.head_dim))  # (N, H + 2 K, d)
        if self.config.model_type == "qwen3":
            q, k, v = qkv.split((H, K, K), 1)
            qkv = torch.cat((self.q_norm(q), self.k_norm(k), v), 1)
        return self.o_proj(attend(self.layer, qkv, rope), dropout_key)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, config.intermediate_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, dropout_key: int | None) -> Tensor:
        gate_up = self.gate_up_proj(x, dropout_key)  # (N, 2 I)
        if kernels.apply_to(gate_up):
            return self.down_proj(kernels.swiglu(gate_up), dropout_key)
        gate, up = gate_up.chunk(2, -1)
        return self.down_proj(F.silu(gate) * up, dropout_key)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, added: Tensor, rope: Rope, attend: Attend, dropout_key: int | None
    ) -> tuple[Tensor, Tensor]:
        """States (N, D) in fp32 and what the block before adds to them -> the same for the next block."""
        x, normed = self.input_layernorm(x, added)
        x, normed = self.post_attention_layernorm(x, self.self_attn(normed, rope, attend, dropout_key))
        return x, self.mlp(normed, dropout_key)


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
        self.computes_in: torch.dtype | None = None  # where the weights at rest are of another type: sharding.py
        self.recompute = False  # keep only the blocks' inputs for the backward pass (activation checkpointing)
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def dtype(self) -> torch.dtype:
        return self.computes_in or self.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend, dropout_key: int | None = None) -> Tensor:
        """Final hidden states (N, D) of N tokens (N,) at the given RoPE positions (N,).

        Between the blocks the states are fp32, whatever the type of the weights. Without a key nothing is dropped.
        """
        added = self.model.embed_tokens(tokens)  # (N, D)
        x = torch.zeros_like(added, dtype=torch.float32)
        rope = rope_tables(positions, self.config)
        for block in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x, added = checkpoint(block, x, added, rope, attend, dropout_key, use_reentrant=False)
            else:
                x, added = block(x, added, rope, attend, dropout_key)
        return self.model.norm(x, added)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V) in fp32"""
        return self.lm_head(hidden).float()


PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def part_names(name: str) -> list[str]:
    """What a checkpoint calls the matrices that our model keeps in the one of this name."""
    path, _, last = name.rpartition(".")
    return [f"{path}.{part}" for part in PARTS.get(last, (last,))]


def plain_weights(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """The weights, one by one, with their names in a checkpoint; views, but for those of a sharded model, which are
    gathered. Without adapters, and tied embeddings once.
    """
    for name, module in model.named_modules():
        if ".adapter" in name or (name == "lm_head" and model.config.tie_word_embeddings):
            continue
        for kind, weight in module.named_parameters(recurse=False):
            if isinstance(module, Linear):
                for part, piece in zip(part_names(name), whole(weight.detach()).split(module.sizes)):
                    yield f"{part}.{kind}", piece
            else:
                yield f"{name}.{kind}", whole(weight.detach())


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure_precision(config: ModelConfig, device: torch.device) -> str:
    """Which precision the device computes faster in: "bf16" has to win by a quarter.

    It does on GPUs and on CPUs with AMX; of those with AVX512-BF16 some are faster in it and some slower than in fp32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training; and a busy machine cannot keep one thread waiting for another
    x, w = torch.ones(256, config.hidden_size), torch.ones(2 * config.intermediate_size, config.hidden_size)
    given = {name: (x.to(dtype), w.to(dtype)) for name, dtype in PRECISIONS.items()}
    best = dict.fromkeys(PRECISIONS, math.inf)
    for _ in range(20):
        for name in PRECISIONS:  # in turn, so that neither has a busier moment
            clock = time.perf_counter()
            F.linear(*given[name])
            best[name] = min(best[name], time.perf_counter() - clock)
    torch.set_num_threads(threads)
    return "bf16" if 1.25 * best["bf16"] < best["fp32"] else "fp32"


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """A model whose weights are yet to be filled in, its matrices in `dtype`; nothing else is ever in memory."""
    with torch.device("meta"):  # shapes without memory
        model = lower(Transformer(config), dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def working_copy(model: Transformer, precision: str) -> Transformer:
    """What computes: in fp32 the model itself, in bf16 a copy with matrices in bf16 beside the model's fp32 weights.

    Frozen weights, those under LoRA adapters, are not copied: they have to be in that precision already.
    """
    if precision == "fp32":
        return model
    return lower(deepcopy(model, {id(w): w for w in model.parameters() if not w.requires_grad}), PRECISIONS[precision])


def lower(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model with its matrices, and their biases, in `dtype`; norms stay fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(dtype)
    return model


def trained(model: Transformer) -> list[nn.Parameter]:
    """The weights that training moves: all, or those of the adapters."""
    return [w for w in model.parameters() if w.requires_grad]


@torch.no_grad()
def refresh(copy: Transformer, model: Transformer) -> None:
    """Bring a working copy up to date, in place."""
    if is_sharded(model):
        for mine, weight in zip(trained(copy), trained(model)):
            mine.copy_(whole(weight.to(mine.dtype)))
    elif copy is not model:
        for dtype in {weight.dtype for weight in trained(copy)}:  # one kernel for all of a type
            pairs = [(mine, weight) for mine, weight in zip(trained(copy), trained(model)) if mine.dtype == dtype]
            torch._foreach_copy_(*map(list, zip(*pairs)))


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
    first = model.model.layers[0].self_attn.qkv_proj
    H, K, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    with torch.no_grad():
        first.weight[: (H + K) * d].mul_(0.25)  # content shall weigh little against distance
        q_bias, k_bias, _ = first.bias.view(-1, 2, d // 2).split((H, K, K))
        k_bias[:, 0, :pairs] = length
        for head, back in zip(q_bias, (1, 2, 3, 5)):
            head[0, :pairs] = length * torch.cos(frequencies * back)
            head[1, :pairs] = -length * torch.sin(frequencies * back)


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Radians a position, (d/2,), of the rotated pairs. Source: RoFormer, arXiv 2104.09864.

    With Llama 3.1's scaling, pairs that turn less than `low_freq_factor` times over the original positions turn
    `factor` times slower, those that turn more than `high_freq_factor` times as before, and others in between.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if (scaling := config.rope_scaling) is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def rope_tables(positions: Tensor, config: ModelConfig) -> Rope:
    """cos and sin, (N, d/2) each in fp32, of the rotation angles at positions (N,)."""
    angles = positions[:, None].float() * rope_frequencies(config, positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of x (N, heads, d); in fp32."""
    cos, sin = (table[:, None] for table in rope)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def split_heads(
    qkv: Tensor, rope: Rope, config: ModelConfig, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (N, H, d) and keys (N, K, d), rotated, and values (N, K, d), of qkv (N, H + 2 K, d); in its own type
    unless another is asked for."""
    H, K, dtype = config.num_attention_heads, config.num_key_value_heads, dtype or qkv.dtype
    qk, v = qkv.split((H + K, K), 1)
    q, k = rotate(qk, rope).to(dtype).split((H, K), 1)
    return q, k, v.to(dtype)
