"""Count what full-size steps do on a GPU, without one: kernels, bytes moved, FLOPs and memory.

    python -m paper.bench --trace     # Qwen2.5-1.5B: a decoding step, a micro-batch, an update

The code runs unmodified on FakeTensors of cuda:0, which have shapes, dtypes and devices but no
data. The tables say how they count. A step that a CUDA graph could not capture is refused.
"""

import functools
import math
import sys
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import product
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
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lib import attention, packing
from lib.flags import require
from lib.lora import add_lora
from lib.packing import Packed, pack, response_logps
from lib.policy import cast_matmuls, make_policy, trainable_parameters
from lib.transformer import ModelConfig, Transformer
from paper.bench import QWEN, SMALL, Work
from rollout import DecodeBatch, Sampler

BANDWIDTH, FLOPS, SMALLEST = 3.0e12, 650e12, 2.5e-6  # an H100: bytes/s, FLOP/s, s of a tiny kernel
GPU, RANK, DROPOUT, TEMPERATURE = torch.device("cuda:0"), 64, 0.05, 0.7
BUDGET = 16384  # tokens of a micro-batch on a GPU
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
ROWS_OF = {
    "embedding",
    "gather",
    "index",
    "index_select",
    "searchsorted",
}  # read a part of a tensor
ROWS_INTO = {"index_add_", "index_copy_", "index_put_", "scatter_add_"}  # write a part of a tensor
mode = FakeTensorMode()


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

    def __init__(self, capture: bool = False, flops: dict[str, float] | None = None):
        super().__init__()
        self.capture, self.flops, self.kernels = capture, flops or {}, []
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
        # Neither allocations nor views are kernels.
        new = self.add_memory(given, out, func._schema.is_mutable)
        if new and "empty" not in name:
            n_bytes = moved(name, given, new, func._schema.is_mutable)
            self.kernels.append(Kernel(name, n_bytes, self.flops_of(name, given)))
        return out

    def add_memory(self, given: list[Tensor], out, in_place: bool = False) -> list[Tensor]:
        """Follow the memory of results on the GPU; return those that are written, so no views."""
        for x in given:
            self.follow(x, 0)  # what was there before does not count
        read = {storage_key(x) for x in given}
        new = [x for x in tensors(out) if in_place or storage_key(x) not in read]
        new = [x for x in new if x.device == GPU]
        for x in new:
            self.follow(x, x.untyped_storage().nbytes())
        return new

    def follow(self, x: Tensor, n_bytes: int) -> None:
        key = storage_key(x)
        if x.device == GPU and key not in self.known:
            self.known.add(key)
            self.live += n_bytes
            self.peak = max(self.peak, self.live)
            weakref.finalize(x.untyped_storage(), self.release, key, n_bytes)

    def release(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.live -= n_bytes

    def flops_of(self, name: str, given: list[Tensor]) -> float:
        if name in PRODUCTS:
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


def moved(name: str, given: list[Tensor], new: list[Tensor], in_place: bool) -> int:
    """Return the bytes that a kernel reads and writes, each input and output once."""
    if name in ROWS_OF:  # the rows that it takes, twice, and their indices
        return sum(map(size, given[1:])) + 2 * sum(map(size, new))
    if name in ROWS_INTO:
        return sum(map(size, given[1:])) + size(given[-1])
    overwrites = name in ("copy_", "fill_", "zero_")
    return sum(map(size, given[overwrites:])) + sum(map(size, new))


def refuse_in_graph(name: str, given: list[Tensor], kwargs: dict) -> None:
    """Raise RuntimeError where an operation waits for the device or touches the host's memory."""
    masked = name.startswith("index") and any(x.dtype == torch.bool for x in given[1:2])
    if name in WAITS or masked:
        raise RuntimeError(f"{name} waits for the device: a CUDA graph cannot hold it")
    devices = {x.device for x in given if x.ndim} | {torch.device(kwargs.get("device") or GPU)}
    if devices - {GPU, torch.device("cuda")}:
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
    torch.Generator = lambda device: GENERATOR  # FakeTensors draw nothing
    nn.functional.rms_norm = RMS_NORM  # one kernel on a GPU; the CPU build takes it to pieces
    nn.functional.silu = SILU
    attention.flash_attn_varlen_func = attention.flash_attn_with_kvcache = None
    if flash_reads:
        attention.flash_attn_varlen_func = attention.torch_varlen()[0]  # not called
        kernel = functools.partial(flash_attn_with_kvcache, flash_reads)
        attention.flash_attn_with_kvcache = kernel


GENERATOR, RMS_NORM = torch.Generator(), compiled(nn.functional.rms_norm)
SILU = compiled(nn.functional.silu)


def fake(x: Tensor) -> Tensor:
    return FakeTensor(mode, x.detach().to("meta"), GPU)


def build(shape: ModelConfig, lora: bool) -> tuple[Transformer, Transformer]:
    """Return master and policy on cuda:0, as a run builds them."""
    with torch.device("meta"):
        master = Transformer(shape)
        if lora:
            master = add_lora(cast_matmuls(master, torch.bfloat16), RANK, 2 * RANK, DROPOUT, None)
        policy = make_policy(master, "bf16")
    moved = {}  # weights are shared
    for module in [*master.modules(), *policy.modules()]:
        for name, weight in module.named_parameters(recurse=False):
            if weight not in moved:
                moved[weight] = nn.Parameter(fake(weight), weight.requires_grad)
            setattr(module, name, moved[weight])
    return master, policy


def decoding_step(work: Work, policy: Transformer, flash: bool) -> tuple[Trace, int]:
    """Trace one token of each row, past the middle of its response; also count a layer's kernels."""
    T, P, t, before = work.new_tokens, work.prompts, work.new_tokens * 5 // 8, []
    pretend(flash_reads=(t + 1) * flash)
    with mode, torch.no_grad():
        sampler = Sampler(policy, [0, 1], work.group, T, TEMPERATURE)
        sampler.use_graphs = False  # nothing to capture
        batch = DecodeBatch(sampler, P, work.prompt_len)
        batch.P = P
        batch.cache.start(torch.full((P,), work.prompt_len, device=GPU))
        batch.decode_step(t)  # a warm-up, as before a capture
        with Trace(capture=True) as trace:
            for block in policy.model.layers[:2]:
                block.register_forward_pre_hook(lambda *_: before.append(len(trace.kernels)))
            batch.decode_step(t)
    return trace, before[1] - before[0]


def micro_batch(work: Work, policy: Transformer, checkpointing: bool) -> tuple[Trace, int, int]:
    """Trace forward and backward pass of these groups; also return tokens and bytes kept."""
    pretend()
    (P, B), Tp, T = (work.prompts, work.prompts * work.group), work.prompt_len, work.new_tokens
    prompts, responses = (torch.zeros(n, dtype=torch.long) for n in ((P, Tp), (B, T)))
    lengths, index = (torch.full((P,), Tp), torch.full((B,), T)), torch.arange(B) // work.group
    batch = pack(prompts, lengths[0], responses, lengths[1], index)
    attend = attention.varlen_attention(batch, work.shape)  # its indices need data
    for cell in attend.__closure__:
        cell.cell_contents = tree_map(
            lambda x: fake(x) if isinstance(x, Tensor) else x, cell.cell_contents
        )
    packing.packed_attention = lambda *_: attend
    batch, n_tokens = Packed(*map(fake, vars(batch).values())), len(batch.tokens)
    policy.gradient_checkpointing = checkpointing
    queries = T - 1
    pairs = P * Tp * (Tp + 1) / 2 + B * (queries * Tp + queries * (queries + 1) / 2)
    flops = 4 * work.shape.num_attention_heads * work.shape.head_dim * pairs
    flops = {"_varlen_attn": flops, "_varlen_attn_backward": 2.5 * flops}
    with mode, Trace(flops=flops) as trace:
        logps, _ = response_logps(policy, batch, TEMPERATURE, True, 0)
        kept = trace.live
        torch.autograd.grad(logps.sum(), trainable_parameters(policy))
    return trace, n_tokens, kept


# ------------------------------------------------------------------------------------------------
# Tables

DECODING = f"""A decoding step of {{work}} at response token {{t}}, at temperature {TEMPERATURE}.
The time in ms sums over kernels the longest of {1e6 * SMALLEST} us, bytes over {BANDWIDTH / 1e12}
TB/s and FLOPs over {FLOPS / 1e12:.0f} TFLOP/s: an H100's rates, assumed and not measured. A kernel
reads its inputs and writes its outputs once. A compiled region of lib/fused.py is one kernel; views
and allocations are none. LoRA has rank {RANK}. flash is flash-attn, matmul what replaces it.
"""
TRAINING = f"""
A micro-batch: log-probs with entropies and their gradient, at the same rates. A compiled region keeps
its inputs alone, and its backward pass is one kernel, too. KB kept are what the backward pass needs
of each token. The peak does not include what was there before, such as weights. LoRA's dropout is
{DROPOUT}. Loss, reference and optimizer are not traced.
"""
MEMORY = """
Memory of a process in GB (1e9 bytes), in bf16 with --beta above 0. master: weights in fp32. Under
LoRA the reference is the policy's frozen base. adapters: those of master and policy. graphs: the
temporaries of a decoding step, which CUDA graphs hold on to. activations: those kept. backward: what
the peak of a micro-batch adds to them, which is logits and gradients in bf16. exchange: a flat copy
of the gradients for NCCL, when activations are gone; with --fsdp the embedding and two blocks,
gathered, and their gradients in fp32. Not counted: rollout and batch, fragmentation of the allocator,
CUDA's context and NCCL's buffers, a few GB in all.
"""


def print_table(names: str, rows: Iterable[list]) -> None:
    """Print a table in Markdown; floats get two decimals."""
    columns = names.split(", ")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}", flush=True)
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row)
        print(f"| {' | '.join(cells)} |", flush=True)


def decoding_row(trace: Trace, of_layer: int) -> list:
    moved = [trace.n_bytes / 1e9, trace.peak / 1e9, 1e3 * trace.seconds]
    return [len(trace.kernels), of_layer, *moved]


def training_row(trace: Trace, n_tokens: int, kept: int) -> list:
    flops = sum(kernel.flops for kernel in trace.kernels)
    moved = [trace.n_bytes / 1e9, flops / 1e12, trace.seconds]
    return [n_tokens, len(trace.kernels), *moved, round(kept / n_tokens / 1e3), trace.peak / 1e9]


def total(weights: Iterable[Tensor]) -> int:
    return sum({id(w): size(w) for w in weights}.values())


def memory_of(work: Work, models, gpus: int, fsdp: bool, graphs: int, micro_batch: tuple) -> dict:
    """Return the parts of a process's memory in bytes, and their sum."""
    (master, policy), (trace, _, kept), shape = models, micro_batch, work.shape
    trained, shards = trainable_parameters(master), gpus if fsdp else 1
    lora = len(trained) < len(list(master.parameters()))
    adapters = [*trained, *trainable_parameters(policy), *policy.buffers()] if lora else []
    base = total(set(policy.parameters()) - set(adapters))
    n, per_token = sum(w.numel() for w in trained), 4 * shape.num_hidden_layers * shape.kv_size
    parts = {"master": 0 if lora else total(trained) / shards, "policy": base}
    parts |= {"reference": 0 if lora else base, "adapters": total(adapters)}
    parts |= {"gradients": 4 * n / shards, "optimizer": 8 * n / shards}
    cached = work.prompts * (work.prompt_len + work.group * work.new_tokens)
    parts |= {"KV cache": cached * per_token, "graphs": graphs}
    parts |= {"activations": kept, "backward": trace.peak - kept}
    of_blocks = (w for block in policy.model.layers[:2] for w in block.parameters())
    gathered = sum(w.numel() for w in (*of_blocks, policy.lm_head.weight))
    exchange = 6 * gathered if fsdp else 4 * n * (gpus > 1)
    at_once = trace.peak + exchange if fsdp else max(trace.peak, exchange)
    everything = sum(parts.values()) - trace.peak + at_once
    return parts | {"exchange": exchange, "all": everything}


def main(work: Work) -> None:
    require(not no_cuda.why_not(), f"a trace {no_cuda.why_not()}")
    start = time.perf_counter()
    models = {"all weights": build(work.shape, False), "LoRA": build(work.shape, True)}
    work_of = {n: replace(work, prompts=math.ceil(work.prompts / n)) for n in (8, 1)}  # by GPUs

    print(DECODING.format(work=work, t=work.new_tokens * 5 // 8))
    graphs, rows = {}, []
    for (what, (_, policy)), flash, gpus in product(models.items(), (False, True), work_of):
        trace, of_layer = decoding_step(work_of[gpus], policy, flash)
        graphs.setdefault((what, gpus), trace.peak)
        rows.append(
            [what, "flash" if flash else "matmul", f"{work_of[gpus].prompts} x {work.group}"]
        )
        rows[-1] += decoding_row(trace, of_layer)
    print_table("trained, attention, rows, kernels, of a layer, GB, temporary GB, ms", rows)

    print(TRAINING)
    traced, rows = {}, []
    per_group = work.prompt_len + work.group * work.new_tokens
    for (what, (_, policy)), checkpointing, gpus in product(models.items(), (False, True), work_of):
        groups = max(1, min(work_of[gpus].prompts, BUDGET // per_group))
        micro = micro_batch(replace(work, prompts=groups), policy, checkpointing)
        traced[what, checkpointing, gpus] = micro
        rows.append([what, yes(checkpointing), *training_row(*micro)])
    print_table("trained, checkpointing, tokens, kernels, GB, TFLOP, s, KB kept, peak GB", rows)

    print(MEMORY)
    rows = []
    setups = product(models, (1, 8), (False, True))
    setups = [(*setup, False) for setup in setups] + [
        ("all weights", 8, x, True) for x in (False, True)
    ]
    for what, gpus, checkpointing, fsdp in setups:
        micro = traced[what, checkpointing, gpus]
        parts = memory_of(work_of[gpus], models[what], gpus, fsdp, graphs[what, gpus], micro)
        name = "--fsdp" if fsdp else what
        cells = [n / 1e9 for n in parts.values()]
        rows.append([name, gpus, yes(checkpointing), *cells, yes(parts["all"] < 80e9)])
    print_table(f"trained, GPUs, checkpointing, {', '.join(parts)}, fits 80", rows)
    print(f"\nTraced in {time.perf_counter() - start:.0f} s.")


def yes(x: bool) -> str:
    return "yes" if x else "no"


if __name__ == "__main__":
    main(SMALL if "--small" in sys.argv else QWEN)
