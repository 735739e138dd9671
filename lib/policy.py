"""Master weights and the policy that computes: fp32 weights take the steps, bf16 copies run.

    policy = make_policy(master, "bf16")   # samples and computes gradients
    ...                                    # the optimizer steps on `master`
    sync_weights(policy, master)

Weights kept in bf16 would swallow small updates: at lr 1e-5 most round to nothing.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from lib.distributed import full_tensor, is_fsdp
from lib.lora import mark_stale
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
    products = (partial(F.linear, x.to(dtype), w.to(dtype)) for dtype in DTYPES.values())
    fp32, bf16 = fastest(20, *products)
    torch.set_num_threads(threads)
    return "bf16" if 1.25 * bf16 < fp32 else "fp32"


def fastest(rounds: int, *calls: Callable[[], object], warmup: int = 1) -> list[float]:
    """Return the least seconds of each call, timed in turn, so that none meets a busier moment."""
    times = [[] for _ in calls]
    for call, seconds in list(zip(calls, times)) * (warmup + rounds):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return [min(seconds[warmup:]) for seconds in times]


def cast_matmuls(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Cast matrices and their biases to `dtype`, in place; norms stay fp32."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.to(dtype)
    return model


class NothingDrawn(TorchFunctionMode):
    """Leaves weights as they are: on meta, drawing them imports torch.compile, in a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        draws = getattr(function, "__module__", "") == "torch.nn.init"
        return None if draws else function(*args, **(kwargs or {}))


def empty_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Return a model with uninitialised weights, matrices in `dtype`; allocates nothing else."""
    with torch.device("meta"), NothingDrawn():  # shapes without memory
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
    """Copy the master's trainable weights into the policy, in place; call it after each step."""
    pairs = list(zip(trainable_parameters(policy), trainable_parameters(master)))
    if is_fsdp(master):
        for mine, weight in pairs:  # one at a time: whole weights take memory
            mine.copy_(full_tensor(weight.to(mine.dtype)))
    elif policy is not master:
        for dtype in {mine.dtype for mine, _ in pairs}:  # one kernel for all weights of a dtype
            mine, weights = zip(*(pair for pair in pairs if pair[0].dtype == dtype))
            torch._foreach_copy_(list(mine), list(weights))
    mark_stale(policy)
