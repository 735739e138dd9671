"""LoRA: small trained matrices beside the frozen ones of the blocks (arXiv 2106.09685).

    policy = add_lora(base, rank, alpha, dropout, generator)    # shares every weight of `base`, which is frozen
    base = without_adapters(policy)                             # and back

For a matrix W of (out, in), A of (rank, in) and B of (out, rank), which is zero at first, add B A x * alpha / rank to
W x. Where our model keeps several matrices of a checkpoint in one, each has an A and a B of its own, those of A one
below the other and those of B likewise. The policy without its adapters is `base`: the reference of the KL divergence
costs no memory.

What is saved is the model with its adapters merged; they lie beside it in the format of PEFT, for `peft` to load and
for runs to resume from.
"""

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import Linear, Transformer, part_names
from runtime import at_least, fail, require, stream, write_json

WEIGHTS = "adapter_model.safetensors"


class Adapter(nn.Module):
    def __init__(self, linear: Linear, rank: int, alpha: int, dropout: float, place: int, generator: torch.Generator):
        super().__init__()
        self.sizes, self.rank, self.alpha, self.dropout, self.place = linear.sizes, rank, alpha, dropout, place
        self.scale = alpha / rank
        self.a = nn.Parameter(torch.empty(len(linear.sizes) * rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        bound = 1 / math.sqrt(linear.in_features)
        with torch.no_grad():
            self.a.uniform_(-bound, bound, generator=generator)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """A (rank, in) and B (out, rank) of each of the checkpoint's matrices."""
        return list(zip(self.a.chunk(len(self.sizes)), self.b.split(self.sizes)))

    def forward(self, x: Tensor, dropout_key: int | None) -> Tensor:
        """(N, in) -> (N, out). What is dropped depends on the key alone, so that it can be computed again."""
        scale = self.scale
        if self.dropout and dropout_key is not None:
            generator = torch.Generator(x.device).manual_seed(dropout_key + self.place)
            x = x * (torch.rand(x.shape, generator=generator, device=x.device) >= self.dropout)
            scale = scale / (1 - self.dropout)
        low = (scale * F.linear(x, self.a)).chunk(len(self.sizes), -1)  # (N, rank) each
        return torch.cat([F.linear(part, b) for part, b in zip(low, self.b.split(self.sizes))], -1)


def adapted(model: Transformer) -> dict[str, Linear]:
    """The matrices that have adapters, by name."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: linear for name, linear in found.items() if linear.adapter is not None}


def add_lora(base: Transformer, rank: int, alpha: int, dropout: float, generator: torch.Generator) -> Transformer:
    """The model with adapters, in fp32, on every matrix of its blocks; it shares all weights of `base`, now frozen.

    `generator` is a CPU generator, on any device.
    """
    base.requires_grad_(False)
    policy = deepcopy(base, {id(w): w for w in base.parameters()})
    for place, linear in enumerate(m for m in policy.modules() if isinstance(m, Linear)):
        linear.adapter = Adapter(linear, rank, alpha, dropout, place, generator).to(base.device)
    return policy


def without_adapters(policy: Transformer) -> Transformer:
    """The frozen model under the adapters; shares its weights."""
    base = deepcopy(policy, {id(w): w for w in policy.parameters()})
    for linear in adapted(base).values():
        linear.adapter = None
    return base


def check_lora(config) -> None:
    """Refuse impossible --lora flags."""
    at_least(config, lora=0, lora_alpha=1)
    require(0 <= config.lora_dropout < 1, "--lora-dropout must lie between 0 and 1")


def dropout_key(config, update: int, rank: int, piece: int) -> int | None:
    """The key of what is dropped in a piece of an update's work; None where nothing is."""
    dropped = config.lora and config.lora_dropout
    return stream(config.seed, "dropout", update, rank, piece).getrandbits(60) if dropped else None


def weight_deltas(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Each adapted matrix by its name in a checkpoint, and what is added to it, alpha / rank * B A; in fp32."""
    for name, linear in adapted(model).items():
        for part, (a, b) in zip(part_names(name), linear.adapter.pairs()):
            yield f"{part}.weight", (linear.adapter.scale * (b @ a)).detach().cpu()


# ------------------------------------------------------------------------------------------------------------------
# PEFT's format


def peft_weights(model: Transformer) -> dict[str, Tensor]:
    """The adapters under PEFT's names, as views."""
    weights = {}
    for name, linear in adapted(model).items():
        for part, (a, b) in zip(part_names(name), linear.adapter.pairs()):
            weights[f"base_model.model.{part}.lora_A.weight"] = a.detach()
            weights[f"base_model.model.{part}.lora_B.weight"] = b.detach()
    return weights


def save_adapters(model: Transformer, base: str, folder: Path) -> None:
    """Write the adapters, which belong to the model called `base`."""
    folder.mkdir()
    save_file({name: w.cpu().contiguous() for name, w in peft_weights(model).items()}, folder / WEIGHTS)
    linears = adapted(model)
    one = next(iter(linears.values())).adapter
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": one.dropout,
        "target_modules": sorted({part.rpartition(".")[2] for name in linears for part in part_names(name)}),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(folder / "adapter_config.json", config)


def load_adapters(model: Transformer, folder: Path) -> None:
    """Read what `save_adapters` wrote for a model with adapters of the same rank."""
    try:
        found = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        fail(f"cannot read the adapters in {folder / WEIGHTS}: {error}")
    wanted = peft_weights(model)
    same = found.keys() == wanted.keys() and all(found[name].shape == w.shape for name, w in wanted.items())
    require(same, f"the adapters in {folder / WEIGHTS} are not those of this model and --lora")
    for name, weight in wanted.items():
        weight.copy_(found[name])
