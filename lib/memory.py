"""What the sampler's cache and the trainer's micro-batches may take of a GPU's memory.

The cache takes at most half of what is free when all has been set aside that training will still
allocate. What is then left is for activations. On the CPU neither depends on what is free.
"""

import torch
from torch import Tensor

from lib import fused
from lib.distributed import World, is_fsdp, n_threads, processes_here
from lib.limits import PROCESS_BYTES, memory_limit
from lib.packing import MAX_LOGITS, micro_batches
from lib.policy import trainable_parameters
from lib.transformer import ModelConfig

CPU_BYTES = 0.7e9  # that a micro-batch keeps there for its backward pass
CPU_CACHE = 0.4e9  # that a thread's KV cache takes: some 130 rows of SmolLM2; more are no faster


def free_bytes(device: torch.device) -> int:
    """Return how much may still be allocated: of a GPU, or of a thread's share of the machine.

    On the CPU this goes by the limit, not by what is free: that varies, the batch size would vary
    with it, and results would differ in the last bits. It is at most twice CPU_CACHE.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(min(2 * CPU_CACHE, thread_bytes(device) / 4))


def thread_bytes(device: torch.device) -> float:
    """Return the share of the machine's memory that each thread on the CPU has."""
    processes = processes_here()
    spare = max(0, memory_limit() - processes * PROCESS_BYTES)
    return spare / n_threads(device) / processes


def prefill_bytes(model) -> int:
    """Return what a token of a prompt takes at most while prompts are computed: in the MLP."""
    config = model.config
    in_dtype = 3 * config.intermediate_size + config.hidden_size  # of gate_up, SwiGLU and the norm
    return model.dtype.itemsize * in_dtype + 4 * config.hidden_size


def still_to_come(run, world: World) -> int:
    """Return the bytes that training will allocate on a GPU besides activations; 0 on the CPU.

    `run` is a lib.training.Run; its optimizer's two moments count until the first step.
    """
    if world.device.type == "cpu":
        return 0
    trained = sum(weight.numel() for weight in trainable_parameters(run.policy))
    shards = world.world_size if is_fsdp(run.master) else 1
    n_bytes = (4 if run.optimizer.state else 12) * trained // shards  # with the gradient, in fp32
    n_bytes += run.policy.dtype.itemsize * trained  # a micro-batch's gradient
    if world.world_size > shards:
        n_bytes += 4 * trained  # the gradient in one piece, to be summed over the processes
    if run.policy.lm_head.weight.requires_grad:  # in fp32, with a chunk's gradient and their sum
        n_bytes += 12 * run.policy.lm_head.weight.numel()
    return n_bytes + 5 * 4 * MAX_LOGITS["cuda"]  # logits, log-probs, entropies and their gradients


def activation_bytes(
    config: ModelConfig, lora: int, dropout: bool, checkpointing: bool, keys_per_token: float = 1.5
) -> int:
    """Return what a token holds from the forward to the backward pass, on a GPU in 16 bits.

    It sums what the operations of lib/transformer.py keep. Each response has a copy of its prompt's
    keys and values: there are `keys_per_token` in all. A test counts what a layer really keeps.
    """
    D, inner, kv = config.hidden_size, config.intermediate_size, config.kv_size
    q, block_input = config.num_attention_heads * config.head_dim, 6 * D  # fp32 and 16 bits
    layer = 2 * block_input + 4 * inner  # what goes into both norms and into SwiGLU
    layer += 6 * (q + kv)  # qkv_proj's output, q and k after rotation, the output
    layer += int(4 * kv * keys_per_token)
    if lora:  # what goes into four adapters, with the masks of their dropout, and their low ranks
        layer += (2 + dropout) * (2 * D + q + inner) + 14 * lora
    else:  # what goes into qkv_proj, gate_up_proj and down_proj
        layer += 2 * (2 * D + inner)
    layers = config.num_hidden_layers
    return layers * block_input + layer if checkpointing else layers * layer


def keys_per_token(prompt_lengths: Tensor, response_lengths: Tensor) -> float:
    """Return for how many tokens attention keeps keys and values, by lengths (P,) and (P, G)."""
    prompts, responses = int(prompt_lengths.sum()), int(response_lengths.sum())
    copies = prompts * response_lengths.shape[1]  # each response has its prompt's
    return (prompts + copies + responses) / max(1, prompts + responses)


def micro_batches_that_fit(
    run, world: World, prompt_lengths: Tensor, response_lengths: Tensor, active: Tensor
) -> list[Tensor]:
    """Split the groups `active` into micro-batches as large as memory allows, for all threads.

    Lengths are (P,) and (P, G), active are indices into P, as in lib.packing.micro_batches.
    """
    keys = keys_per_token(prompt_lengths[active], response_lengths[active])
    limits = micro_batch_tokens(run, world, keys), n_threads(world.device)
    return micro_batches(prompt_lengths, response_lengths, active, *limits)


def micro_batch_tokens(run, world: World, keys_per_token: float = 1.5) -> int:
    """Return how many tokens a forward and backward pass of GRPO may take."""
    config = run.config
    if config.micro_batch_tokens:
        return config.micro_batch_tokens
    adapters = config.lora or 0, bool(config.lora_dropout)
    kept = *adapters, config.gradient_checkpointing, keys_per_token
    n_bytes = activation_bytes(run.policy.config, *kept)
    if world.device.type == "cpu":  # as many as its caches hold, and as its thread's share allows
        kept = min(CPU_BYTES, thread_bytes(world.device) / 2)
        return max(256, min(2048, int(2 * kept / n_bytes / run.policy.dtype.itemsize)))
    free = 0.9 * free_bytes(world.device) - still_to_come(run, world)
    if run.policy.dtype == torch.float32:
        n_bytes *= 3  # twice as large, and attention by PyTorch keeps its padding and its scores
    elif not fused.has_triton():
        n_bytes *= 1.3  # operations that are not compiled keep what lies between them, too
    return max(1, int(free / n_bytes / 1024)) * 1024  # so that it does not vary with a few MB
