"""Master weights and the policy that computes: fp32 weights take the steps, bf16 copies run.

    policy = make_policy(master, "bf16")        # what samples and computes gradients
    accumulate_gradients(master, policy, ...)   # the policy's gradients, into `master` in fp32
    optimizer.step()                            # on `master`
    sync_weights(policy, master)

Weights kept in bf16 would swallow small updates: at lr 1e-5 most round to nothing.
"""

import math
import timeit
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lib.distributed import full_tensor, in_threads, is_fsdp, n_threads
from lib.flags import require
from lib.transformer import ModelConfig, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def detect_dtype(config: ModelConfig, device: torch.device) -> str:
    """Return "bf16" where the device is at least a quarter faster in it, else "fp32".

    GPUs and CPUs with AMX are; of CPUs with AVX512-BF16 some are faster and some are slower.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in training; and on a busy machine two threads would stall
    x, w = (torch.ones(n, config.hidden_size) for n in (256, 2 * config.intermediate_size))
    products = {name: partial(F.linear, x.to(dtype), w.to(dtype)) for name, dtype in DTYPES.items()}
    best = dict.fromkeys(DTYPES, math.inf)
    for _ in range(20):
        for name, product in products.items():  # in turn, so that neither meets a busier moment
            best[name] = min(best[name], timeit.timeit(product, number=1))
    torch.set_num_threads(threads)
    return "bf16" if 1.25 * best["bf16"] < best["fp32"] else "fp32"


def cast_matmuls(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Cast matrices and their biases to `dtype`, in place; norms stay fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(dtype)
    return model


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Return a model with uninitialised weights, matrices in `dtype`; allocates nothing else."""
    with torch.device("meta"):  # shapes without memory
        model = cast_matmuls(Transformer(config), dtype)
    model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def make_policy(master: Transformer, precision: str) -> Transformer:
    """Return the weights used for forward passes: the model itself in fp32, or a bf16 copy.

    Frozen weights, those under LoRA adapters, are shared and must be in that precision already.
    """
    if precision == "fp32":
        return master
    frozen = {id(w): w for w in master.parameters() if not w.requires_grad}
    return cast_matmuls(deepcopy(master, frozen), DTYPES[precision])


def trainable_parameters(model: Transformer) -> list[nn.Parameter]:
    """Return all weights, or with LoRA those of the adapters."""
    return [w for w in model.parameters() if w.requires_grad]


@torch.no_grad()
def sync_weights(policy: Transformer, master: Transformer) -> None:
    """Copy the master's trainable weights into the policy, in place."""
    pairs = list(zip(trainable_parameters(policy), trainable_parameters(master)))
    if is_fsdp(master):
        for mine, weight in pairs:  # one at a time: whole weights take memory
            mine.copy_(full_tensor(weight.to(mine.dtype)))
    elif policy is not master:
        for dtype in {mine.dtype for mine, _ in pairs}:  # one kernel for all weights of a dtype
            mine, weights = zip(*(pair for pair in pairs if pair[0].dtype == dtype))
            torch._foreach_copy_(list(mine), list(weights))


def accumulate_gradients(master: Transformer, policy: Transformer, loss_fn, items) -> list:
    """Add the gradient of the summed losses to master.grad, in fp32; return `loss_fn`'s metrics.

    `loss_fn(i, items[i])` returns a micro-batch's loss and metrics, computed by the policy (under
    FSDP by the master). Metrics come in thread order, not input order; no sum depends on timing.
    """
    metrics = []
    if is_fsdp(master):  # the model itself runs forward and backward, in lockstep on all ranks
        for loss, of_item in map(loss_fn, range(len(items)), items):
            (loss * dist.get_world_size()).backward()  # FSDP averages over the processes
            metrics.append(of_item)
        return metrics

    def worker(numbers: range) -> tuple[list[Tensor], list]:
        total, of_items = [], []
        for i in numbers:
            loss, of_item = loss_fn(i, items[i])
            gradients = torch.autograd.grad(loss, trainable_parameters(policy))
            of_items.append(of_item)
            if total:
                torch._foreach_add_(total, gradients)
            else:
                total = [gradient.float() for gradient in gradients]
        return total, of_items

    n = min(n_threads(master.device), len(items))
    shares = [range(i, len(items), n) for i in range(n)]
    for total, of_worker in in_threads(worker, shares, master.device):
        metrics += of_worker
        for weight, gradient in zip(trainable_parameters(master), total):
            weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return metrics


def clip_grad_norm(model: nn.Module, max_norm: float) -> float:
    """Scale the gradient down to norm `max_norm` where it is longer; return its norm before."""
    return full_tensor(nn.utils.clip_grad_norm_(trainable_parameters(model), max_norm)).item()


def count_nonfinite(nonfinite: int, loss: float, grad_norm: float, run: Path) -> int:
    """Return how many updates in a row had a non-finite loss or gradient: `nonfinite` before this.

    The caller skips such an update; the fifth in a row ends the run.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return 0
    require(
        nonfinite < 4,
        f"the loss ({loss}) or the gradient's norm ({grad_norm}) was not finite in five updates "
        "in a row. None of them was taken. Start a new run with a lower --lr or with --precision "
        f"fp32, from the newest checkpoint in {run} if there is one (--init, for SFT --model)",
    )
    return nonfinite + 1
