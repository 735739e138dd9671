"""Pretend a GPU: tensors that say they are on cuda:0, with their data on the CPU.

    export PYTHONPATH=.                                       # from the repository root
    python tests/pretend.py [--flash] paper.bench --small     # a module or a script, with flags
    python tests/pretend.py pytest -m gpu                     # --flash: flash-attn is there, too

What depends on the device then runs as on a GPU, with real numbers: the unmodified sampler, trainer
and optimizer. What would fail on a GPU fails here: tensors of two devices in one operation, kernels
that get types, strides or lengths they do not take, and, while a CUDA graph is captured, whatever
waits for the device. A replay repeats the captured operations on the captured tensors and numbers,
so a step that needs anything else goes wrong. What it cannot show: speed, memory, the rounding of
kernels, alignment, streams, NCCL.
"""

# ruff: noqa: E402  (no_cuda loads before torch)
import no_cuda

no_cuda.load()

import collections
import contextlib
import functools
import importlib.machinery
import runpy
import sys
import types
import weakref

import torch
from torch import Tensor
from torch.overrides import enable_reentrant_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_map_only

GPU = torch.device("cuda", 0)
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2")
COPIES = ("_to_copy", "copy_")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
HALVES = (torch.float16, torch.bfloat16)


MEMORY = weakref.WeakKeyDictionary()  # the bytes of the GPU's storages that are alive


class GPUTensor(torch.Tensor):
    """A tensor of cuda:0 whose data lies in `inner`, a tensor of the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options = {"dtype": inner.dtype, "device": GPU} | layout
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **options)

    def __init__(self, inner: Tensor):
        self.inner = inner
        MEMORY[inner.untyped_storage()] = inner.untyped_storage().nbytes()

    def __repr__(self) -> str:
        return f"GPUTensor({self.inner})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the GPU while no GPU is pretended")


FOR_GPU = weakref.WeakValueDictionary()  # generators, by address: all that an operation sees


class Generator(torch.Generator):
    """A generator of the CPU that may say it is the GPU's."""

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        if torch.device(device).type == "cuda":
            FOR_GPU[self._cdata] = self
        return self


class PretendedGPU(TorchDispatchMode):
    """Runs operations on GPUTensors, by the rules of a GPU."""

    def __init__(self):
        super().__init__()
        self.graph: CUDAGraph | None = None  # while one is captured
        self.syncs = collections.Counter()  # what has waited for the device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = {k: x for k, x in (kwargs or {}).items() if k != "pin_memory"}  # safetensors asks
        tensors = tensors_in((*args, *kwargs.values()))
        here = any(isinstance(x, GPUTensor) for x in tensors)
        target = torch.device(kwargs.get("device") or (GPU if here else "cpu"))
        if generator := kwargs.get("generator"):
            same = (generator._cdata in FOR_GPU) == (target.type == "cuda")
            check(same, f"{func}: a generator of another device")
        if not here and target.type != "cuda":
            return func(*args, **kwargs)

        if here:
            refuse_mixed_devices(func, args, tensors)
        if why := waits(func, args, kwargs, tensors, target):
            self.syncs[why] += 1
            check(self.graph is None, f"{why} waits for the device while a graph is captured")
        moved = {"device": "cpu"} if kwargs.get("device") and target.type == "cuda" else {}
        call = func, *tree_map_only(GPUTensor, lambda x: x.inner, (args, kwargs | moved))
        if self.graph is not None:
            self.graph.keep_what_changes(*call)
        out = run(*call)
        if self.graph is not None:
            self.graph.calls.append((*call, out))
        if target.type != "cuda":
            return out
        wrapped = tree_map_only(Tensor, GPUTensor, out)
        aliases = here and any(x.alias_info for x in func._schema.returns)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if aliases else wrapped


def check(condition: bool, message: str) -> None:
    """Raise RuntimeError, as PyTorch's TORCH_CHECK does."""
    if not condition:
        raise RuntimeError(message)


def tensors_in(x) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results."""
    if isinstance(x, Tensor):
        return [x]
    return [t for y in x for t in tensors_in(y)] if isinstance(x, tuple | list) else []


def refuse_mixed_devices(func, args: tuple, tensors: list[Tensor]) -> None:
    """Single numbers of the CPU may go with any tensor, larger tensors be copied or be indices."""
    name = func.overloadpacket.__name__
    if name in INDEXING:
        tensors = tensors_in((args[0], *args[2:3]))
    strangers = [tuple(x.shape) for x in tensors if not isinstance(x, GPUTensor) and x.dim()]
    what = f"all tensors must be on one device, but {strangers} are on the CPU"
    check(not strangers or name in COPIES, f"{func}: {what}")


def waits(func, args: tuple, kwargs: dict, tensors: list[Tensor], target: torch.device) -> str:
    """Say what makes an operation wait for the device; "" if nothing does."""
    name = func.overloadpacket.__name__
    if name in SYNCS:
        return name
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if name in INDEXING:
        indices = tensors_in(args[1])
        if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
            return f"{name} with a mask"
        return "" if all(isinstance(x, GPUTensor) for x in indices) else f"{name} by the CPU's"
    devices = {x.device.type for x in tensors} | ({target.type} if name == "_to_copy" else set())
    return f"{name} between CPU and GPU" if name in COPIES and len(devices) > 1 else ""


class CUDAGraph:
    """Operations with their tensors of the CPU, in order."""

    def __init__(self):
        self.calls, self.kept = [], {}

    def keep_what_changes(self, func, args: tuple, kwargs: dict) -> None:
        """Keep what an operation overwrites: a real capture runs nothing."""
        arguments = func._schema.arguments
        values = dict(zip([x.name for x in arguments], args)) | kwargs
        written = [values[x.name] for x in arguments if x.alias_info and x.alias_info.is_write]
        for storage in (x.untyped_storage() for x in tensors_in(written)):
            if storage._cdata not in self.kept:
                self.kept[storage._cdata] = storage, storage.clone()

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        with _disable_current_modes(), torch.no_grad():
            for func, args, kwargs, out in self.calls:
                again = run(func, args, kwargs)
                for captured, new in zip(tensors_in(out), tensors_in(again)):
                    if captured.data_ptr() != new.data_ptr():
                        captured.copy_(new)


@contextlib.contextmanager
def capture(graph: CUDAGraph, pool=None):
    """Stand in for torch.cuda.graph."""
    gpu.graph = graph
    try:
        yield
    finally:
        gpu.graph = None
        for storage, before in graph.kept.values():
            storage.copy_(before)
        graph.kept.clear()


# ------------------------------------------------------------------------------------------------
# Kernels that the CPU build lacks


def run(func, args: tuple, kwargs: dict):
    """Run an operation on tensors of the CPU."""
    return KERNELS.get(str(func), func)(*args, **kwargs)


def product(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
    """torch.mm and torch.bmm of 16 bits with a result in fp32."""
    check(a.dtype == b.dtype and a.dtype in HALVES, f"out_dtype with inputs in {a.dtype}")
    check(out_dtype == torch.float32, f"out_dtype {out_dtype}")
    return a.float() @ b.float()


def attend(q, k, v, n_queries: list[int], n_keys: list[int], causal=False) -> tuple[Tensor, Tensor]:
    """Attend within segments, in fp32: the output (N, H, d) and the log-sum-exps (H, N)."""
    out, sums = [], []
    for Q, K, V in zip(q.split(n_queries), k.split(n_keys), v.split(n_keys)):
        R = q.shape[1] // k.shape[1]
        Q, K, V = (x.float().transpose(0, 1) for x in (Q, K, V))  # (heads, tokens, d)
        K, V = K.repeat_interleave(R, 0), V.repeat_interleave(R, 0)
        scores = Q @ K.mT * q.shape[2] ** -0.5
        if causal:  # aligned to the ends
            Tq, Tk = scores.shape[1:]
            scores = scores + torch.full((Tq, Tk), -torch.inf).triu(Tk - Tq + 1)
        out.append((scores.softmax(-1) @ V).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(out).to(q.dtype), torch.cat(sums, 1)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, causal: bool = False, *_) -> tuple[Tensor, ...]:
    """PyTorch's varlen kernel: the output, the sums (H, N), and a state of random numbers."""
    check_varlen(q, k, v, cu_q, cu_k, max_q, max_k)
    out, sums = attend(q, k, v, cu_q.diff().tolist(), cu_k.diff().tolist(), causal)
    return out, sums, torch.zeros(2, dtype=torch.uint64)


def varlen_backward(grad, q, k, v, out, sums, *others) -> tuple[Tensor, ...]:
    """Its gradients, by autograd, which has to be switched on again within an operation."""
    with enable_reentrant_dispatch(), torch._C._DisableTorchDispatch(), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(varlen(*inputs, *others)[0], inputs, grad)


def check_varlen(q, k, v, cu_q, cu_k, max_q: int, max_k: int) -> None:
    """Check what mha_varlen_fwd of flash-attn 2.8.3 does (flash_api.cpp), as PyTorch's copy."""
    check(q.dtype in HALVES and q.dtype == k.dtype == v.dtype, f"varlen attention in {q.dtype}")
    check({x.stride(-1) for x in (q, k, v)} == {1}, "the last dimension must be contiguous")
    lengths = {(x.dtype, x.is_contiguous(), len(x)) for x in (cu_q, cu_k)}
    check(lengths == {(torch.int32, True, len(cu_q))}, "cu_seqlens must be contiguous int32")
    check(q.shape[2] % 8 == 0 and q.shape[2] <= 256, f"heads of {q.shape[2]}")
    check(q.shape[1] % k.shape[1] == 0, "key heads must divide query heads")
    for name, cu, x, longest in (("q", cu_q, q, max_q), ("k", cu_k, k, max_k)):
        check(int(cu[-1]) == len(x), f"cu_seqlens_{name} end at {int(cu[-1])}, not {len(x)}")
        check(int(cu.diff().max()) <= longest, f"a segment is longer than max_seqlen_{name}")


def flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q: int, max_k: int, *, causal: bool) -> Tensor:
    """Stand in for flash-attn's; PyTorch's is the same kernel."""
    check(type(max_q) is type(max_k) is int, "max_seqlens must be Python's ints")
    if max_q == 1 and q.shape[1] > k.shape[1]:  # q is reshaped to (S, K, H / K, d) first
        check(len(q) == len(cu_q) - 1, "max_seqlen_q is 1 and a segment is empty")
    from torch.nn.attention import varlen  # noqa: F401  (defines the operation)

    return torch.ops.torch_attn._varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, causal)[0]


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, **_):
    """Stand in for flash-attn's with log-sum-exps; checks as in 2.8.3's mha_fwd_kvcache."""
    (B, Tq, H, d), (_, T, K, _) = q.shape, k_cache.shape
    given = [x for x in (q, k_cache, v_cache, k, v) if x is not None]
    check(q.dtype in HALVES and len({x.dtype for x in given}) == 1, f"kvcache in {q.dtype}")
    check(all(x.device == GPU for x in (*given, cache_seqlens)), "a tensor is not on the GPU")
    check(k_cache.stride(-1) == v_cache.stride(-1) == 1, "the last dimension must be contiguous")
    check(k_cache.shape == v_cache.shape == (B, T, K, d), "the cache has another shape")
    check(H % K == 0 and d <= 256, f"{H} heads of {d}, {K} key heads")
    right = cache_seqlens.dtype == torch.int32 and cache_seqlens.is_contiguous()
    check(right and cache_seqlens.shape == (B,), "cache_seqlens must be contiguous int32 (B,)")
    if k is not None:
        check(k.shape == v.shape == (B, 1, K, d), "one new key and value a row")
        folded = H // K if Tq == 1 and H > K and d % 8 == 0 else Tq  # heads become queries
        check(folded <= T, f"If key is supplied, seqlen_q ({folded}) must be <= the cache's ({T})")
    return torch.ops.pretend.kvcache(q, k_cache, v_cache, k, v, cache_seqlens)


def kvcache(q, k_cache, v_cache, k, v, lengths) -> tuple[Tensor, Tensor]:
    """Store k and v (B, 1, K, d) at `lengths`, then attend: (B, Tq, H, d) and sums (B, H, Tq)."""
    B, _, H, _ = q.shape
    lengths, rows = lengths.long(), torch.arange(B)
    if k is not None:
        k_cache[rows, lengths], v_cache[rows, lengths] = k[:, 0], v[:, 0]
        lengths = lengths + 1
    valid = torch.arange(k_cache.shape[1]) < lengths[:, None]
    segments = [q.shape[1]] * B, lengths.tolist()
    out, sums = attend(q.flatten(0, 1), k_cache[valid], v_cache[valid], *segments)
    return out.view_as(q), sums.view(H, B, -1).transpose(0, 1).contiguous()


LIBRARY = torch.library.Library("pretend", "DEF")
CACHES = "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, Tensor lengths"
LIBRARY.define(f"kvcache(Tensor q, {CACHES}) -> (Tensor, Tensor)")
KERNELS = {"aten.mm.dtype": product, "aten.bmm.dtype": product, "pretend.kvcache.default": kvcache}
KERNELS |= {"torch_attn._varlen_attn.default": varlen}
KERNELS |= {"torch_attn._varlen_attn_backward.default": varlen_backward}

gpu = PretendedGPU()


def start() -> None:
    """Make torch.cuda say that there is a GPU; its tensors live within `with gpu:`."""
    answers = {"is_available": True, "device_count": 1, "current_device": 0}
    answers |= {"get_device_name": "pretended GPU", "is_bf16_supported": True}
    answers |= {"mem_get_info": (60 * 2**30, 80 * 2**30), "memory_allocated": 0}
    answers |= {"memory_reserved": 0, "max_memory_allocated": 0, "reset_peak_memory_stats": None}
    answers |= {"set_device": None, "synchronize": None, "_lazy_init": None, "empty_cache": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, functools.partial(lambda answer, *_, **__: answer, answer))
    torch.cuda.CUDAGraph, torch.cuda.graph, torch.Generator = CUDAGraph, capture, Generator
    torch.__future__.set_swap_module_params_on_conversion(True)  # param.data = loses the class
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor builds on the CPU, then copies


def main() -> None:
    if "--flash" in sys.argv[1:2]:
        sys.argv.remove("--flash")
        module = sys.modules["flash_attn"] = types.ModuleType("flash_attn")
        module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
        module.flash_attn_varlen_func = flash_attn_varlen_func
        module.flash_attn_with_kvcache = flash_attn_with_kvcache
    start()
    sys.argv = sys.argv[1:]
    with gpu:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
