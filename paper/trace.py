"""Count what full-size steps do on a GPU, without one: kernels, bytes moved, FLOPs and memory.

    python -m paper.bench --trace     # Qwen2.5-1.5B: a decoding step, a micro-batch, an update

The code runs unmodified, in half a minute, on FakeTensors of cuda:0, which have shapes, dtypes and
devices but no data. The tables say how they count. A decoding step that a CUDA graph could not
capture is refused.
"""

import functools
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

from paper import no_cuda

if not no_cuda.why_not():
    no_cuda.load()  # before torch, for the backward pass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lib import attention, fused, memory, packing
from lib.distributed import World
from lib.flags import require
from lib.lora import add_lora
from lib.packing import Packed, pack, response_logps
from lib.policy import cast_matmuls, make_policy, trainable_parameters
from lib.training import accumulate_gradients
from lib.transformer import ModelConfig, Transformer
from paper.bench import QWEN, SMALL, Work
from rollout import DecodeBatch, Sampler
from train_grpo import GrpoConfig

BANDWIDTH, FLOPS, SMALLEST = 3.0e12, 650e12, 2.5e-6  # an H100: bytes/s, FLOP/s, s of a tiny kernel
GPU, RANK, DROPOUT, TEMPERATURE = torch.device("cuda:0"), 64, 0.05, 0.7
MEMORY = 80e9  # bytes of a GPU
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "repeat_interleave"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ROWS_OF = {"embedding", "gather", "index", "index_select", "searchsorted"}  # read rows of a tensor
ROWS_INTO = {"index_add_", "index_copy_", "index_put_", "scatter_add_"}  # write rows
Models = tuple[Transformer, Transformer]  # master and policy
fake_mode, generator = FakeTensorMode(), torch.Generator()


class Kernel(NamedTuple):
    name: str
    n_bytes: int
    flops: float = 0

    @property
    def seconds(self) -> float:
        return max(SMALLEST, self.n_bytes / BANDWIDTH, self.flops / FLOPS)


class Trace(TorchDispatchMode):
    """Record the kernels that run on cuda:0, and the memory of the tensors that they make.

    `capture` refuses what a CUDA graph cannot hold. `flops` are those of kernels, by name, that do
    not follow from shapes.
    """

    def __init__(self, flops: dict[str, float] | None = None, capture: bool = False):
        super().__init__()
        self.flops, self.capture, self.kernels = flops or {}, capture, []
        self.live = self.peak = 0  # bytes
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace.startswith("prim"):
            return func(*args, **kwargs)
        name, given = func.overloadpacket.__name__, tensors((args, kwargs))
        if self.capture:
            refuse_in_graph(name, given, kwargs)
        out = func(*args, **kwargs)
        new = self.add_memory(given, args[0] if out is None else out, func._schema.is_mutable)
        if new and "empty" not in name:  # neither views nor allocations are kernels
            self.kernels.append(Kernel(name, moved(name, given, new), self.flops_of(name, given)))
        return out

    def add_memory(self, given: list[Tensor], out, in_place: bool = False) -> list[Tensor]:
        """Follow the memory of results on the GPU; return those that are written, so no views."""
        for x in given:
            self.follow(x, 0)  # what was there before does not count
        read = {storage_key(x) for x in given}
        new = [x for x in tensors(out) if x.is_cuda and (in_place or storage_key(x) not in read)]
        for x in new:
            self.follow(x, x.untyped_storage().nbytes())
        return new

    def follow(self, x: Tensor, n_bytes: int) -> None:
        key = storage_key(x)
        if x.is_cuda and key not in self.known:
            self.known.add(key)
            self.live += n_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(x.untyped_storage(), self.release, key, n_bytes)

    def release(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.live -= n_bytes

    def flops_of(self, name: str, given: list[Tensor]) -> float:
        if name.rstrip("_") in PRODUCTS:
            a, b = given[-2:]
            return 2 * a.numel() * b.shape[-1]
        return self.flops.get(name, 0)

    @property
    def n_bytes(self) -> int:
        return sum(kernel.n_bytes for kernel in self.kernels)

    @property
    def seconds(self) -> float:
        return sum(kernel.seconds for kernel in self.kernels)


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def storage_key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


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


def refuse_in_graph(name: str, given: list[Tensor], kwargs: dict) -> None:
    """Raise RuntimeError where an operation waits for the device or touches the host's memory."""
    masked = name.startswith("index") and any(x.dtype == torch.bool for x in given[1:2])
    if name in WAITS or masked:
        raise RuntimeError(f"{name} waits for the device: a CUDA graph cannot hold it")
    # A scalar of the host is an argument of a kernel, unless it is copied.
    devices = [x.device for x in given if x.ndim or "copy" in name]
    if any(torch.device(x).type == "cpu" for x in (*devices, kwargs.get("device") or GPU)):
        raise RuntimeError(f"{name} uses the host's memory: a CUDA graph cannot hold it")


def in_one_kernel(function: Callable, *args):
    """Call a function as one kernel, which reads the tensors in `args` and writes its results."""
    if not isinstance(_get_current_dispatch_mode(), Trace):  # nothing counts, or it counts already
        return function(*args)
    with _pop_mode_temporarily() as trace:
        out = function(*args)
    given = tensors(args)
    new = trace.add_memory(given, out)
    trace.kernels.append(Kernel(function.__name__, sum(map(size, given + new))))
    return out


class Region(torch.autograd.Function):
    """A compiled region. It keeps its inputs and computes the rest again in its backward pass."""

    @staticmethod
    def forward(ctx, function, *inputs):
        ctx.set_materialize_grads(False)
        ctx.function = function
        ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]
        return in_one_kernel(function, *inputs)

    @staticmethod
    def backward(ctx, *grads):
        needed = ctx.needs_input_grad[1:]

        def gradients(grads, *saved):
            pairs = zip(saved, ctx.others, needed)
            inputs = [x if s is None else s.detach().requires_grad_(n) for s, x, n in pairs]
            with torch.enable_grad():
                outputs = tree_leaves(ctx.function(*inputs))
            outputs, grads = zip(*(p for p in zip(outputs, grads) if p[1] is not None))
            wanted = [x for x, n in zip(inputs, needed) if n]
            return torch.autograd.grad(outputs, wanted, grads, allow_unused=True)

        found = iter(in_one_kernel(gradients, grads, *ctx.saved_tensors))
        return None, *(next(found) if n else None for n in needed)


def compiled(function: Callable) -> Callable:
    """Stand in for torch.compile: the function becomes one kernel, and one in its backward pass."""

    def call(*args):
        leaves, spec = tree_flatten(args)
        region = functools.wraps(function)(lambda *leaves: function(*tree_unflatten(leaves, spec)))
        return Region.apply(region, *leaves)

    return call


def flash_attn_with_kvcache(n, q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, **_):
    """Check what flash-attn 2.8.3 checks, and count as a kernel that reads `n` of a response."""
    (B, Tq, H, d), (_, Tk, K, _) = q.shape, k_cache.shape
    new = [] if k is None else [k, v]
    for x in (q, k_cache, v_cache, *new):
        assert x.dtype == q.dtype != torch.float32 and x.stride(-1) == 1 and x.device == GPU
    assert k_cache.shape == v_cache.shape == (B, Tk, K, d) and H % K == 0 and d <= 256
    assert all(x.shape == (B, 1, K, d) for x in new)
    assert not new or (H // K if Tq == 1 else Tq) <= Tk, "more queries than the cache has entries"
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.device == GPU
    assert cache_seqlens.is_contiguous() and cache_seqlens.shape == (B,)

    def flash(q, *_):
        return torch.empty_like(q), q.new_empty(B, H, Tq, dtype=torch.float32)

    k_cache, v_cache = (x[:, :n] if new else x for x in (k_cache, v_cache))
    return compiled(flash)(q, k_cache, v_cache, cache_seqlens, *new)


def pretend(flash_reads: int = 0) -> None:
    """Let PyTorch's CPU build pass for one with a GPU and, if it reads tokens, for flash-attn."""
    torch.cuda._lazy_init = lambda: None
    torch.Generator = lambda device: generator  # FakeTensors draw nothing
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=GPU) shows as a copy
    fused.has_triton, fused.compiled = lambda: True, compiled
    attention.flash_attn_varlen_func = attention.flash_attn_with_kvcache = None
    if flash_reads:
        attention.flash_attn_varlen_func = attention.torch_varlen()[0]  # not called
        kernel = functools.partial(flash_attn_with_kvcache, flash_reads)
        attention.flash_attn_with_kvcache = kernel


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
def decoding_step(work: Work, policy: Transformer, flash: bool) -> tuple[Trace, int]:
    """Trace one token of each row, past its response's middle; also return a layer's kernels."""
    T, P, t, before = work.new_tokens, work.prompts, work.new_tokens * 5 // 8, []
    pretend(flash_reads=(t + 1) * flash)
    with fake_mode, torch.no_grad():
        sampler = Sampler(policy, [0, 1], work.group, T, TEMPERATURE)
        sampler.use_graphs = False  # there is nothing to capture
        batch = DecodeBatch(sampler, P, work.prompt_len)
        batch.P = P
        batch.cache.start(torch.full((P,), work.prompt_len, device=GPU))
        batch.decode_step(t)  # a warm-up, as before a capture
        with Trace(capture=True) as trace:
            for block in policy.model.layers[:2]:
                block.register_forward_pre_hook(lambda *_: before.append(len(trace.kernels)))
            batch.decode_step(t)
    return trace, before[1] - before[0]


class Setup(NamedTuple):
    """A way to train, and the share of the work that a process has."""

    trained: str  # all weights, LoRA or --fsdp
    models: Models
    work: Work
    gpus: int
    checkpointing: bool


def resident_memory(setup: Setup) -> dict[str, float]:
    """Return the bytes of what is there whenever training begins, by part."""
    (master, policy), work, lora = setup.models, setup.work, setup.trained == "LoRA"
    trained, shards = trainable_parameters(master), setup.gpus if setup.trained == "--fsdp" else 1
    sharded = 4 * sum(w.numel() for w in trained) / shards  # in fp32
    adapters = {*trained, *trainable_parameters(policy), *policy.buffers()} if lora else set()
    base = total(set(policy.parameters()) - adapters)
    parts = {"master": 0.0 if lora else sharded, "policy": base, "reference": 0.0 if lora else base}
    parts |= {"adapters": total(adapters), "optimizer": 2 * sharded}
    sizes = work.prompts, work.group, work.prompt_len, work.new_tokens
    parts |= {"KV cache": attention.cache_bytes(policy, *sizes)}
    return parts | {"graphs": decoding_step(work, policy, False)[0].peak}


def memory_of(setup: Setup) -> dict[str, float]:
    """Return the bytes of a process's memory while it trains, by part, and their sum."""
    trace, _, kept = micro_batch(first_micro_batch(setup), setup.models, setup.checkpointing)
    (master, policy), fsdp = setup.models, setup.trained == "--fsdp"
    blocks = (w for block in policy.model.layers[:2] for w in block.parameters())
    exchange = 6 * sum(w.numel() for w in (policy.lm_head.weight, *blocks))
    if not fsdp:
        exchange = 4 * sum(w.numel() for w in trainable_parameters(master)) * (setup.gpus > 1)
    parts = resident_memory(setup)
    parts |= {"gradients": parts["optimizer"] / 2}
    everything = sum(parts.values())
    everything += trace.peak + exchange if fsdp else max(trace.peak, exchange)
    parts |= {"activations": kept, "backward": trace.peak - kept, "exchange": exchange}
    return parts | {"all": everything}


def total(tensors: Iterable[Tensor]) -> int:
    return sum(map(size, tensors))


def first_micro_batch(setup: Setup) -> Work:
    """Return the groups that are trained on first: as many as lib/memory.py plans."""
    (master, policy), work, lora = setup.models, setup.work, setup.trained == "LoRA"
    config = GrpoConfig(lora=RANK * lora, lora_dropout=DROPOUT, beta=0.05)
    config.gradient_checkpointing = setup.checkpointing
    run = {"config": config, "master": master, "policy": policy, "reference": policy}
    run = SimpleNamespace(**run, optimizer=SimpleNamespace(state=True))  # after the first step
    memory.is_fsdp = lambda model: setup.trained == "--fsdp"
    memory.free_bytes = lambda device: MEMORY - sum(resident_memory(setup).values())
    budget = memory.micro_batch_tokens(run, World(0, setup.gpus, GPU))
    groups = budget // (work.prompt_len + work.group * work.new_tokens)
    return replace(work, prompts=max(1, min(work.prompts, groups)))


def pack_groups(work: Work) -> tuple[Packed, int]:
    """Pack all groups, with data; also return their number of pairs of a query and a key."""
    P, Tp, T, G = work.prompts, work.prompt_len, work.new_tokens, work.group
    prompts, responses = (torch.zeros(n, dtype=torch.long) for n in ((P, Tp), (P * G, T)))
    lengths, index = torch.full((P * G,), T), torch.arange(P * G) // G
    batch = pack(prompts, torch.full((P,), Tp), responses, lengths, index)
    return batch, P * (Tp * (Tp + 1) // 2 + G * ((T - 1) * Tp + T * (T - 1) // 2))


@functools.cache
def micro_batch(work: Work, models: Models, checkpointing: bool) -> tuple[Trace, int, int]:
    """Trace forward and backward pass; also return the tokens, and the bytes kept between them.

    It is an update's second micro-batch, so there is a gradient in fp32, which the peak leaves out.
    """
    pretend()
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
            return sum((2 * w).sum() for w in trainable_parameters(policy)), {}
        before, trace.peak = trace.live, trace.live
        trace.kernels.clear()
        logps, _ = response_logps(policy, batch, TEMPERATURE, True, dropout_key=0)
        kept = trace.live - before
        return logps.sum(), {}

    batch = Packed(*map(fake, vars(batch).values()))
    with fake_mode, trace:
        accumulate_gradients(master, policy, loss_fn, [batch, batch], World(0, 1, GPU))
    trace.peak -= sum(w.grad.nbytes for w in trainable_parameters(master))
    master.zero_grad()
    return trace, len(batch.tokens), kept


# ------------------------------------------------------------------------------------------------
# Tables

DECODING = f"""A decoding step: prompts of {{0.prompt_len}} tokens, responses of {{0.new_tokens}},
temperature {TEMPERATURE}. ms: the sum over kernels of the longest of {1e6 * SMALLEST} us, bytes at
{BANDWIDTH / 1e12} TB/s and FLOPs at {FLOPS / 1e12:.0f} TFLOP/s, rates of an H100 that are assumed.
A kernel reads its inputs and writes its outputs once. A compiled region of lib/fused.py is one
kernel; views and allocations are none. LoRA has rank {RANK}. flash is with flash-attn.
"""
TRAINING = f"""
An update's second micro-batch: log-probs with entropies, their gradient, and adding it to the
first one's, at the same rates. It has as many tokens as lib/memory.py plans on {MEMORY:.0e} bytes.
A compiled region is taken to keep its inputs (real ones keep about a tenth less), and to be one
kernel in the backward pass, too. KB kept: what that pass needs of a token, beside what was planned.
The peak is without weights and the gradient in fp32. LoRA's dropout is {DROPOUT}. Not traced: loss,
reference, the optimizer's step.
"""
MEMORY_OF = """
A process's memory meanwhile, in GB (1e9 bytes), with --beta above 0. master: weights in fp32. Under
LoRA the reference is the policy's frozen base. adapters: those of master and policy. graphs: the
temporaries of a decoding step, which CUDA graphs hold on to. activations: those kept. backward:
what the peak adds, logits, gradients in bf16 (fewer with --fsdp) and one recomputed layer.
exchange: a flat copy of the gradients for NCCL, after the micro-batches; with --fsdp the embedding
and two blocks, gathered, and their gradients in fp32. Not counted: rollout and batch, what the
allocator cannot use, the CUDA context and NCCL's buffers; a few GB in all.
"""


def print_table(columns: str, rows: Iterable[list]) -> None:
    """Print a table in Markdown, each row as soon as it is known; numbers get two decimals."""
    print(f"| {columns} |\n|{' --- |' * len(columns.split('|'))}", flush=True)
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def decoding_rows(models: dict[str, Models], shares: dict[int, Work]) -> Iterator[list]:
    settings = product(("all weights", "LoRA"), ("matmul", "flash"), shares.values())
    for trained, backend, work in settings:
        trace, of_layer = decoding_step(work, models[trained][1], backend == "flash")
        numbers = [len(trace.kernels), of_layer, trace.n_bytes / 1e9, trace.peak / 1e9]
        rows = f"{work.prompts} x {work.group}"
        yield [trained, backend, rows, *numbers, 1e3 * trace.seconds]


def name_of(setup: Setup) -> list:
    return [setup.trained, setup.gpus, "yes" if setup.checkpointing else "no"]


def training_rows(setups: list[Setup]) -> Iterator[list]:
    for setup in setups:
        work, lora = first_micro_batch(setup), setup.trained == "LoRA"
        trace, n_tokens, kept = micro_batch(work, setup.models, setup.checkpointing)
        planned = memory.activation_bytes(work.shape, RANK * lora, lora, setup.checkpointing)
        flops = sum(kernel.flops for kernel in trace.kernels)
        numbers = [trace.n_bytes / 1e9, flops / 1e12, trace.seconds, kept / n_tokens / 1e3]
        numbers += [planned / 1e3, trace.peak / 1e9]
        yield [*name_of(setup), n_tokens, len(trace.kernels), *numbers]


def memory_rows(setups: list[Setup]) -> Iterator[list]:
    for setup in setups:
        parts = memory_of(setup)
        fits = "yes" if parts["all"] < MEMORY else "no"
        yield [*name_of(setup), *(n / 1e9 for n in parts.values()), fits]


def main(work: Work) -> None:
    require(not no_cuda.why_not(), f"a trace {no_cuda.why_not()}")
    start = time.perf_counter()
    models = {"all weights": build(work.shape, False), "LoRA": build(work.shape, True)}
    models["--fsdp"] = models["all weights"]
    shares = {n: replace(work, prompts=math.ceil(work.prompts / n)) for n in (1, 8)}  # by GPUs
    print(DECODING.format(work))
    columns = "trained | attention | rows | kernels | of a layer | GB moved | temporary GB | ms"
    print_table(columns, decoding_rows(models, shares))

    ways = [*product(("all weights", "LoRA"), shares), ("--fsdp", 8)]
    ways = product(ways, (False, True))
    setups = [Setup(name, models[name], shares[n], n, on) for (name, n), on in ways]
    columns = "tokens | kernels | GB moved | TFLOP | s | KB kept | KB planned | peak GB"
    print(TRAINING)
    print_table(f"trained | GPUs | checkpointing | {columns}", training_rows(setups))
    columns = " | ".join(memory_of(setups[0]))
    print(MEMORY_OF)
    print_table(f"trained | GPUs | checkpointing | {columns} | fits", memory_rows(setups))
    print(f"\nTraced in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main(SMALL if "--small" in sys.argv else QWEN)
