"""LoRA: small trained matrices beside the frozen ones of the blocks (arXiv 2106.09685).

    master = add_lora(base, rank, alpha, dropout, generator)    # freezes and shares base's weights
    base = without_adapters(master)                             # and back

For a matrix W (out, in), A (rank, in) and B (out, rank), which starts at zero, add B A x * alpha /
rank to W x. Where our model stacks several of a checkpoint's matrices, each has its own A and B,
stacked likewise. The base is the reference of the KL term, without a second copy in memory.
A checkpoint holds the adapters in PEFT's format, for `peft` to load and for runs to resume from.
"""

import math
import threading
from copy import deepcopy
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lib import kernels
from lib.flags import write_json
from lib.rng import rng
from lib.transformer import Linear, Transformer, part_names

WEIGHTS = "adapter_model.safetensors"
one_block = threading.Lock()  # the first of several threads makes a block, the others wait
packed_adapters = WeakKeyDictionary()  # A and [W, B] of each, which cannot be copied with it


class Adapter(nn.Module):
    def __init__(self, linear: Linear, rank: int, alpha: int, dropout: float, number: int):
        super().__init__()
        self.sizes, self.rank, self.scale = linear.sizes, rank, alpha / rank
        self.dropout, self.number = dropout, number  # among the model's adapters: part of its seed
        self.a = nn.Parameter(torch.empty(len(linear.sizes) * rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        self.register_buffer("block", None, persistent=False)  # made of B
        self.stale = True  # whether what is made of A and B has to be made anew: they have changed

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return A (rank, in) and B (out, rank) of each of the checkpoint's matrices."""
        return list(zip(self.a.chunk(len(self.sizes)), self.b.split(self.sizes)))

    @torch.no_grad()
    def scaled_block(self) -> Tensor:
        """Return alpha / rank * B of all matrices as one block-diagonal one (matrices * rank, out).

        One product with it, zeros included, takes less than one for each matrix and putting these
        together. CUDA graphs read it where it is, so it is made anew in place; each rollout begins
        with a prefill, which runs outside the graphs and comes by here.
        """
        with one_block:
            if self.stale:
                block = (self.scale * torch.block_diag(*self.b.split(self.sizes))).t().contiguous()
                self.block = block if self.block is None else self.block.copy_(block)
                packed_adapters.pop(self, None)
                self.stale = False
        return self.block

    def joint_product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return x W' and the adapter's product (N, out) by one product of [x, x A'] and [W, B].

        In sampling on the CPU that is faster than to add the adapter's product. kernels.packs must
        hold of `weight`.
        """
        block = self.scaled_block()
        with one_block:
            if self not in packed_adapters:
                joint = torch.cat((weight, block.t()), 1)  # (out, in + matrices * rank)
                packed_adapters[self] = kernels.pack(self.a), kernels.pack(joint)
            a, joint = packed_adapters[self]
        return kernels.packed_linear(torch.cat((x, kernels.packed_linear(x, a)), 1), joint, bias)

    def forward(self, x: Tensor, out: Tensor, dropout_key: int | None) -> Tensor:
        """Add the adapter's product with x (N, in) to out (N, out), in place.

        Dropout depends on the key alone, so it can be recomputed. Training frees what sampling has
        packed, which a step makes stale anyway: 0.3 GB of SmolLM2.
        """
        packed_adapters.pop(self, None)
        kept = 1.0
        if self.dropout and dropout_key is not None:
            generator = torch.Generator(x.device).manual_seed(dropout_key + self.number)
            x = x * (torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout)
            kept -= self.dropout
        return AddProduct.apply(out, x, self.a, self.b, self.scaled_block(), 1 / kept, self)


class AddProduct(torch.autograd.Function):
    """out (N, out) += factor * x A' block, in place: nothing of its size is copied."""

    @staticmethod
    def forward(ctx, out, x, a, b, block: Tensor, factor: float, adapter: Adapter) -> Tensor:
        low = F.linear(x, a) if factor == 1 else factor * F.linear(x, a)  # (N, matrices * rank)
        ctx.save_for_backward(x, a, block, low)
        ctx.factor, ctx.adapter = factor, adapter
        ctx.mark_dirty(out)
        return out.addmm_(low, block)

    @staticmethod
    def backward(ctx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, a, block, low = ctx.saved_tensors
        d_low, adapter = ctx.factor * (d_out @ block.t()), ctx.adapter
        pairs = zip(d_out.split(adapter.sizes, -1), low.split(adapter.rank, -1))
        d_b = adapter.scale * torch.cat([d_part.t() @ low_part for d_part, low_part in pairs])
        d_x = d_low @ a if ctx.needs_input_grad[1] else None
        return d_out, d_x, d_low.t() @ x, d_b, None, None, None


def adapted(model: Transformer) -> dict[str, Linear]:
    """Return the matrices that have adapters, by name."""
    return {name: m for name, m in model.named_modules() if getattr(m, "adapter", None) is not None}


def mark_stale(model: Transformer) -> None:
    """Say that adapters have changed. PyTorch does not: fused optimizers count no versions."""
    for linear in adapted(model).values():
        linear.adapter.stale = True


def add_lora(base: Transformer, rank: int, alpha: int, dropout: float, generator) -> Transformer:
    """Freeze `base`; return it with fp32 adapters on every matrix of its blocks, weights shared.

    `generator` is a CPU generator, whatever the device.
    """
    base.requires_grad_(False)
    model = deepcopy(base, {id(w): w for w in base.parameters()})
    for number, linear in enumerate(m for m in model.modules() if isinstance(m, Linear)):
        adapter = Adapter(linear, rank, alpha, dropout, number)
        bound = 1 / math.sqrt(linear.in_features)
        nn.init.uniform_(adapter.a, -bound, bound, generator)
        linear.adapter = adapter.to(base.device)
    return model


def without_adapters(model: Transformer) -> Transformer:
    """Return the frozen model under the adapters; shares its weights."""
    base = deepcopy(model, {id(w): w for w in model.parameters()})
    for linear in adapted(base).values():
        linear.adapter = None
    return base


def dropout_key(config, update: int, rank: int, micro_batch: int) -> int | None:
    """Return the dropout seed of one micro-batch; None if dropout is off."""
    if not (config.lora and config.lora_dropout):
        return None
    return rng(config.seed, "dropout", update, rank, micro_batch).getrandbits(60)


def peft_weights(model: Transformer) -> dict[str, Tensor]:
    """Return the adapters under PEFT's names, as views."""
    weights = {}
    for name, linear in adapted(model).items():
        for part, (a, b) in zip(part_names(name), linear.adapter.pairs()):
            weights[f"base_model.model.{part}.lora_A.weight"] = a.detach()
            weights[f"base_model.model.{part}.lora_B.weight"] = b.detach()
    return weights


def save_adapters(weights: dict[str, Tensor], meta: dict, folder: Path) -> None:
    """Write what `peft_weights` returned in PEFT's format. `meta` says what made it."""
    folder.mkdir()
    save_file(weights, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": meta["lora"]}
    config |= {"base_model_name_or_path": meta["init_name"], "bias": "none"}
    config |= {key: meta[key] for key in ("lora_alpha", "lora_dropout")} | {"inference_mode": True}
    config["target_modules"] = sorted({name.split(".")[-3] for name in weights})
    write_json(folder / "adapter_config.json", config)


def adapters_alone(checkpoint: Path, start: str) -> str:
    """Say what a checkpoint is whose start is gone, and what to do."""
    model, folder = "AutoModelForCausalLM.from_pretrained(START, dtype='float32')", checkpoint
    merge = f"PeftModel.from_pretrained({model}, {str(folder / 'adapter')!r}).merge_and_unload()"
    gone = f"{start} is gone, has changed or lacks its own start; {folder} holds adapters alone"
    return f"{gone}. Put that back, or merge them into another copy, START, by PEFT: {merge}"


def read_adapters(folder: Path) -> dict[str, Tensor]:
    """Return what `save_adapters` wrote, by PEFT's names."""
    return load_file(folder / WEIGHTS)


def load_adapters(model: Transformer, folder: Path) -> None:
    """Load what `save_adapters` wrote into a model with adapters of the same rank."""
    saved = read_adapters(folder)
    for name, weight in peft_weights(model).items():
        weight.copy_(saved[name])
    mark_stale(model)


def add_adapters(name: str, weight: Tensor, adapters: dict[str, Tensor], scale: float) -> Tensor:
    """Return a checkpoint's weight of this name plus scale * B A, in fp32, if it has adapters."""
    part = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{part}.lora_A.weight" not in adapters:
        return weight
    a, b = (adapters[f"{part}.lora_{letter}.weight"] for letter in "AB")
    return weight.float() + scale * (b @ a)
