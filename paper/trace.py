"""Count what full-size steps do on a GPU, without one: kernels, bytes moved, FLOPs and memory.

    python -m paper.bench --trace     # Qwen2.5-1.5B: a decoding step and a micro-batch

The code runs unmodified, in half a minute, on FakeTensors of cuda:0, which have shapes, dtypes and
devices but no data. The tables say how they count. What such code computes: tests/pretend.py.
"""

import functools
import math
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

from paper import no_cuda

if not no_cuda.why_not():
    no_cuda.load()  # before torch, for the backward pass

import torch
import torch.utils._python_dispatch as dispatch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lib import attention, fused, memory, packing
from lib.distributed import World
from lib.flags import require
from lib.lora import adapted, add_lora
from lib.packing import Packed, pack, response_logps
from lib.policy import cast_matmuls, make_policy, trainable_parameters
from lib.tables import markdown
from lib.training import accumulate_gradients
from lib.transformer import ModelConfig, Transformer
from paper.bench import QWEN, SMALL, Work
from rollout import DecodeBatch, Sampler
from train_grpo import GrpoConfig

BANDWIDTH, FLOPS, SMALLEST = 3.0e12, 650e12, 2.5e-6  # an H100: bytes/s, FLOP/s, s of a tiny kernel
GPU, RANK, DROPOUT, TEMPERATURE = torch.device("cuda:0"), 64, 0.05, 0.7
MEMORY, GPUS = 80e9, 8  # bytes of a GPU; processes with --fsdp
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ROWS_OF = {"embedding", "gather", "index", "index_select", "searchsorted"}  # read rows of a tensor
ROWS_INTO = {"index_add_", "index_copy_", "index_put_", "scatter_add_"}  # write rows
COPY_FIRST = {"baddbmm", "masked_fill"}  # copy their first input, then work on the copy in place
IN_REGION = {"joint_softmax": 4}  # kernels of a compiled region on an H100, where not one
Models = tuple[Transformer, Transformer]  # master and policy
fake_mode, generator = FakeTensorMode(), torch.Generator()


class Kernel(NamedTuple):
    name: str
    n_bytes: int
    flops: float = 0

    @property
    def seconds(self) -> float:
        return max(SMALLEST, self.n_bytes / BANDWIDTH, self.flops / FLOPS)


class Trace(dispatch.TorchDispatchMode):
    """Record the kernels that run on cuda:0, and the memory of the tensors that they make."""

    def __init__(self, flops: dict[str, float] | None = None):
        super().__init__()
        self.kernels, self.flops = [], flops or {}  # of kernels by name, where shapes do not tell
        self.storages = weakref.WeakKeyDictionary()  # the bytes of those that are alive
        self.peak = 0  # bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, given = func.overloadpacket.__name__, tensors((args, kwargs))
        out = func(*args, **kwargs or {})
        new = self.add_memory(given, args[0] if out is None else out, func._schema.is_mutable)
        if name in COPY_FIRST:
            self.kernels.append(Kernel("copy_", size(given[0]) + size(out)))
        if new and "empty" not in name:  # neither views nor allocations are kernels
            self.kernels.append(Kernel(name, moved(name, given, new), self.flops_of(name, given)))
        return out

    def add_memory(self, given: list[Tensor], out, in_place: bool = False) -> list[Tensor]:
        """Follow the memory of results on the GPU; return those that are written, so no views."""
        read = {x.untyped_storage() for x in given}
        for storage in read:
            self.storages.setdefault(storage, 0)  # what was there before does not count
        results = [x for x in tensors(out) if x.is_cuda]
        new = [x for x in results if in_place or x.untyped_storage() not in read]
        for storage in (x.untyped_storage() for x in new):
            self.storages.setdefault(storage, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return new

    @property
    def live(self) -> int:
        return sum(self.storages.values())

    def flops_of(self, name: str, given: list[Tensor]) -> float:
        if name.rstrip("_") in PRODUCTS:
            a, b = given[-2:]
            return 2 * a.numel() * b.shape[-1]
        return self.flops.get(name, 0)

    def totals(self) -> dict[str, float]:
        """Return what the kernels do together, by name."""
        of_each = ((k.n_bytes / 1e9, k.flops / 1e12, 1e3 * k.seconds) for k in self.kernels)
        sums = zip(("GB moved", "TFLOP", "ms"), map(sum, zip(*of_each)))
        return {"kernels": len(self.kernels), **dict(sums)}


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def size(x: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded lies in memory once."""
    return x.element_size() * math.prod(n if step else 1 for n, step in zip(x.shape, x.stride()))


def moved(name: str, given: list[Tensor], new: list[Tensor]) -> int:
    """Return the bytes that a kernel reads and writes, each input and output once."""
    if name in ROWS_OF:  # the rows that it takes, twice, and their indices
        return sum(map(size, given[1:])) + 2 * sum(map(size, new))
    if name in ROWS_INTO:
        return sum(map(size, given[1:])) + size(given[-1])
    like = name.startswith("new_") or name.endswith("_like")  # read the shape alone
    unread = like or name in ("copy_", "fill_", "zero_")
    return sum(map(size, given[unread:])) + sum(map(size, new))


def in_one_kernel(function: Callable, *args):
    """Call a function as one kernel, which reads the tensors in `args` and writes its results.

    Where it is several, each reads as much, and the last one writes.
    """
    if not isinstance(dispatch._get_current_dispatch_mode(), Trace):  # nothing counts, or already
        return function(*args)
    with dispatch._pop_mode_temporarily() as trace:
        out, given, name = function(*args), tensors(args), function.__name__
        read, written = (sum(map(size, x)) for x in (given, trace.add_memory(given, out)))
        trace.kernels += [Kernel(name, read)] * (IN_REGION.get(name, 1) - 1)
        trace.kernels.append(Kernel(name, read + written))
    return out


class Region(torch.autograd.Function):
    """A compiled region. It keeps its inputs and computes the rest again in its backward pass."""

    @staticmethod
    def forward(ctx, function, options, *inputs):
        ctx.function, ctx.options = function, options
        ctx.save_for_backward(*inputs)
        return in_one_kernel(function, *inputs, *options)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[2:]

        def gradients(grads, *saved):
            inputs = [x.detach().requires_grad_(n) for x, n in zip(saved, needed)]
            with torch.enable_grad():
                outputs = ctx.function(*inputs, *ctx.options)
            wanted = [x for x in inputs if x.requires_grad]
            return torch.autograd.grad(outputs, wanted, grads)

        found = iter(in_one_kernel(gradients, grads, *ctx.saved_tensors))
        return None, None, *(next(found) if n else None for n in needed)


def compiled(function: Callable) -> Callable:
    """Stand in for torch.compile: the function is in_one_kernel, and so is its backward pass."""

    def call(*args):
        n = len(tensors(args))  # which come first
        return Region.apply(function, args[n:], *args[:n])

    return call


def flash_attn_with_kvcache(n, q, k_cache, v_cache, *new, cache_seqlens, return_softmax_lse):
    """Count flash-attn's as a kernel that reads a prompt's whole cache, or `n` of a response's."""

    def flash(q, *_):
        B, Tq, H, _ = q.shape
        return torch.empty_like(q), q.new_empty(B, H, Tq, dtype=torch.float32)

    k_cache, v_cache = (x[:, :n] if new else x for x in (k_cache, v_cache))
    return in_one_kernel(flash, q, k_cache, v_cache, cache_seqlens, *new)


def pretend() -> None:
    """Let PyTorch's CPU build pass for one with a GPU and Triton."""
    torch.cuda._lazy_init = lambda: None
    torch.Generator = lambda device: generator  # FakeTensors draw nothing
    fused.has_triton, fused.compiled = lambda: True, compiled
    attention.flash_attn_varlen_func = None  # PyTorch's is the same kernel


def fake(x: Tensor) -> Tensor:
    return FakeTensor(fake_mode, x.detach().to("meta"), GPU)


def build(shape: ModelConfig, lora: bool) -> Models:
    """Return master and policy on cuda:0, as a run builds them."""
    with torch.device("meta"):
        master = Transformer(shape)
        if lora:
            master = add_lora(cast_matmuls(master, torch.bfloat16), RANK, 2 * RANK, DROPOUT, None)
        policy = make_policy(master, "bf16")
    on_gpu = {}  # what is shared stays shared
    for module in (*master.modules(), *policy.modules()):
        for name, weight in module.named_parameters(recurse=False):
            if weight not in on_gpu:
                on_gpu[weight] = nn.Parameter(fake(weight), weight.requires_grad)
            setattr(module, name, on_gpu[weight])
    return master, policy


@functools.cache
def decoding_step(work: Work, policy: Transformer, backend: str) -> tuple[Trace, int]:
    """Trace one token of each row, past its response's middle; also return a layer's kernels."""
    T, P, t, before = work.new_tokens, work.prompts, work.new_tokens * 5 // 8, []
    attention.decode_backend = lambda model: backend
    attention.flash_attn_with_kvcache = functools.partial(flash_attn_with_kvcache, t + 1)
    with fake_mode, torch.no_grad():
        sampler = Sampler(policy, [0, 1], work.group, T, TEMPERATURE)
        sampler.use_graphs = False  # there is nothing to capture
        batch = DecodeBatch(sampler, P, work.prompt_len)
        batch.P = P
        batch.cache.start(torch.full((P,), work.prompt_len, device=GPU))
        batch.decode_step(t)  # a warm-up, as before a capture
        with Trace() as trace:
            for block in policy.model.layers[:2]:
                block.register_forward_pre_hook(lambda *_: before.append(len(trace.kernels)))
            batch.decode_step(t)
    return trace, before[1] - before[0]


def memory_at_start(work: Work, models: Models, gpus: int) -> dict[str, float]:
    """Return the bytes of what is there whenever training begins, by part."""
    master, policy = models
    temporaries = decoding_step(work, policy, "matmul")[0].peak
    in_fp32 = 4 * sum(w.numel() for w in trainable_parameters(master)) / gpus
    weights = in_fp32 + sum(map(size, (*policy.parameters(), *policy.buffers())))
    if not adapted(policy):  # under LoRA the reference is the policy without its adapters
        weights += sum(map(size, policy.parameters()))
    sizes = work.prompts, work.group, work.prompt_len, work.new_tokens
    sampler = attention.cache_bytes(policy, *sizes) + temporaries
    return {"weights": weights, "optimizer": 2 * in_fp32, "sampler": sampler}


def planned_batch(work: Work, models: Models, config: GrpoConfig, gpus: int, free: float) -> Work:
    """Return the groups that are trained on at once: as many as lib/memory.py plans."""
    run = SimpleNamespace(config=config, master=models[0], policy=models[1])
    run.optimizer = SimpleNamespace(state=True)  # after the first step
    memory.is_fsdp = lambda model: True  # which shards nothing over one process
    memory.free_bytes = lambda device: free
    budget = memory.micro_batch_tokens(run, World(0, gpus, GPU))
    groups = budget // (work.prompt_len + work.group * work.new_tokens)
    return replace(work, prompts=max(1, min(work.prompts, groups)))


def update_numbers(work: Work, models: Models, gpus: int, checkpointing: bool) -> dict:
    """Return what an update's second micro-batch does, and the GB of memory meanwhile, by name."""
    (_, policy), lora = models, RANK * bool(adapted(models[1]))
    config = GrpoConfig(lora=lora, lora_dropout=DROPOUT, beta=1)
    config.gradient_checkpointing = checkpointing
    parts = memory_at_start(work, models, gpus)
    work = planned_batch(work, models, config, gpus, MEMORY - sum(parts.values()))
    trace, n_tokens, kept = micro_batch(work, models, checkpointing)
    planned = memory.activation_bytes(work.shape, lora, lora > 0, checkpointing)
    numbers = {"tokens": n_tokens, **trace.totals()}
    numbers |= {"KB kept": kept / n_tokens / 1e3, "KB planned": planned / 1e3}

    parts |= {"gradient": parts["optimizer"] / 2, "activations": kept}
    blocks = (w for block in policy.model.layers[:2] for w in block.parameters())
    gathered = 6 * sum(w.numel() for w in (policy.lm_head.weight, *blocks))
    parts |= {"backward": trace.peak - kept, "gathered": gathered * (gpus > 1)}
    parts["all"] = sum(parts.values())
    return numbers | {f"GB: {name}": n_bytes / 1e9 for name, n_bytes in parts.items()}


def pack_groups(work: Work) -> tuple[Packed, int]:
    """Pack all groups, with data; also return their number of pairs of a query and a key."""
    P, Tp, T, G = work.prompts, work.prompt_len, work.new_tokens, work.group
    prompts, responses = (torch.zeros(n, dtype=torch.long) for n in ((P, Tp), (P * G, T)))
    prompts[:, 0] = torch.arange(P)  # none begins like another
    lengths, index = torch.full((P * G,), T), torch.arange(P * G) // G
    batch = pack(prompts, torch.full((P,), Tp), responses, lengths, index)
    return batch, P * (Tp * (Tp + 1) // 2 + G * ((T - 1) * Tp + T * (T - 1) // 2))


def micro_batch(work: Work, models: Models, checkpointing: bool) -> tuple[Trace, int, int]:
    """Trace an update's second micro-batch; also return its tokens and the bytes it keeps."""
    (master, policy), (batch, pairs), shape = models, pack_groups(work), work.shape
    attend = attention.varlen_attention(batch, shape)  # the indices that it makes need data
    for cell in attend.__closure__:
        if isinstance(cell.cell_contents, Tensor):
            cell.cell_contents = fake(cell.cell_contents)
    packing.packed_attention = lambda *_: attend
    policy.gradient_checkpointing = checkpointing
    flops = 4 * shape.num_attention_heads * shape.head_dim * pairs
    trace, kept = Trace({"_varlen_attn": flops, "_varlen_attn_backward": 2.5 * flops}), 0

    def loss_fn(i: int, batch: Packed) -> tuple[Tensor, dict]:
        nonlocal kept
        if i == 0:  # stands for the first micro-batch: all weights get a gradient
            for linear in adapted(policy).values():
                linear.adapter.scaled_block()  # which the rollout has made
            return sum((2 * w).sum() for w in trainable_parameters(policy)), {}
        before, trace.peak = trace.live, trace.live
        trace.kernels.clear()
        logps, _ = response_logps(policy, batch, TEMPERATURE, True, dropout_key=0)
        kept = trace.live - before
        return logps.sum(), {}

    tensors = [fake(x) for x in vars(batch).values() if isinstance(x, Tensor)]
    batch = Packed(*tensors, batch.shared)
    one_thread = torch.autograd.set_multithreading_enabled(False)  # another frees memory late
    with fake_mode, trace, one_thread:
        accumulate_gradients(master, policy, loss_fn, [batch, batch], World(0, 1, GPU))
    trace.peak -= sum(w.grad.nbytes for w in trainable_parameters(master))  # is no part of it
    master.zero_grad()
    return trace, len(batch.tokens), kept


DECODING = f"""A decoding step: prompts of {{0.prompt_len}} tokens, responses of {{0.new_tokens}},
temperature {TEMPERATURE}. ms: the sum over kernels of the longest of {1e6 * SMALLEST} us, bytes at
{BANDWIDTH / 1e12} TB/s and FLOPs at {FLOPS / 1e12:.0f} TFLOP/s, rates of an H100 that are assumed.
A kernel reads its inputs and writes its outputs once. A compiled region of lib/fused.py is one
kernel, attention's softmax four; views and allocations are none. LoRA has rank {RANK}, dropout
{DROPOUT}. flash: flash-attn.
"""
UPDATE = f"""
An update's second micro-batch: log-probs with entropies, their gradient, and adding it to the
first one's; without loss, reference and optimizer. It has as many tokens as lib/memory.py plans on
{{:.0e}} bytes. --fsdp shards over {GPUS} GPUs. A compiled region is taken to keep its inputs
(real ones keep about a tenth less), and to be one kernel in the backward pass, too. KB kept: what
the backward pass needs of a token; then what was planned.

GB (1e9 bytes) are a process's memory meanwhile. weights: master, policy, and the reference, under
LoRA the policy's frozen base. sampler: the KV cache, and a decoding step's temporaries, which CUDA
graphs hold on to. gradient: in fp32. activations: those kept. backward: what the peak adds, logits,
gradients in bf16 (fewer with --fsdp) and one recomputed layer. gathered: the embedding and two
blocks, and their gradients in fp32. Not counted: rollout and batch, what the allocator cannot use,
the CUDA context and NCCL's buffers; a few GB.
"""


def print_table(rows: list[dict]) -> None:
    """Print rows with the same keys as a table in Markdown."""
    texts = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    print(markdown([*rows[0]], texts))


def main(work: Work) -> None:
    require(not no_cuda.why_not(), f"a trace {no_cuda.why_not()}")
    pretend()
    whole, lora = (build(work.shape, lora) for lora in (False, True))
    share = replace(work, prompts=math.ceil(work.prompts / GPUS))
    print(DECODING.format(work))
    rows, models = [], {"all weights": whole, "LoRA": lora}
    for trained, backend, part in product(models, ("matmul", "flash"), (work, share)):
        trace, of_layer = decoding_step(part, models[trained][1], backend)
        row = {"trained": trained, "attention": backend, "rows": f"{part.prompts} x {part.group}"}
        row |= {**trace.totals(), "kernels of a layer": of_layer}
        rows.append(row | {"temporary GB": trace.peak / 1e9})
    print_table(rows)

    print(UPDATE.format(MEMORY))
    ways = ("all weights", work, whole, 1), ("LoRA", work, lora, 1), ("--fsdp", share, whole, GPUS)
    numbers = {}
    for (name, *way), checkpointing in product(ways, (False, True)):
        name += ", checkpointing" * checkpointing
        numbers[name] = update_numbers(*way, checkpointing)
    print_table([{"": x} | {way: numbers[way][x] for way in numbers} for x in numbers["LoRA"]])


if __name__ == "__main__":
    main(SMALL if "--small" in sys.argv else QWEN)
