"""Batched sampling: P prompts, G responses to each, with their log-probs.

The cache has two parts. A prompt's keys and values are computed and kept once for its whole group; a response's lie
in a contiguous buffer in which all rows stand at the same step, so that prompts of any length need no left padding.
One softmax runs over both. Groups that have finished leave the batch; prompts for which there is no room wait.

A decoding step touches tensors of fixed place and size alone and never waits for the device: the step's number, the
tokens and the noise are read from the device, the drawn tokens written there. On a GPU it is captured in a graph for
each size of the batch; the host only looks every few steps at which groups have finished.

Every prompt has random numbers of its own (one uniform for each token of its group, drawn before the first step), so
what is said to it depends neither on the prompts beside it nor on how they are split over batches and processes.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from model import Rope, Transformer, split_heads
from packed import log_softmax, pack_prompts, packed_attention, pad
from runtime import in_threads, n_threads, torch_stream

try:  # needs CUDA: requirements-gpu.txt
    from flash_attn import flash_attn_with_kvcache
except ImportError:
    flash_attn_with_kvcache = None

LOOK_EVERY = 4  # steps between looks at which groups have finished


@dataclass
class Rollout:
    """B = P * G responses; the group of prompt i is the rows i * G to (i + 1) * G - 1."""

    tokens: Tensor  # (B, T) padded on the right with zeros
    lengths: Tensor  # (B,) the stop token included
    log_probs: Tensor  # (B, T) under the distribution each token was sampled from; 0 where padded
    stopped: Tensor  # (B,) False where max_new_tokens cut the response off

    @staticmethod
    def empty(rows: int, T: int, device: torch.device) -> "Rollout":
        lengths = torch.zeros(rows, dtype=torch.long, device=device)
        return Rollout(lengths.new_zeros(rows, T), lengths, torch.zeros(rows, T, device=device), lengths.bool())

    def responses(self) -> list[list[int]]:
        """The tokens of each response, its stop token left out."""
        lengths = (self.lengths - self.stopped.long()).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths)]


class Sampler:
    """Samples with a model's current weights; on a GPU it keeps cache and graphs from call to call.

    `group` responses to each prompt, of at most `max_new_tokens` tokens; temperature 0 takes the likeliest token
    (log-probs then at 1).
    """

    def __init__(
        self,
        model: Transformer,
        stop_tokens: list[int],
        group: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,
    ):
        self.model, self.group, self.max_new_tokens, self.temperature = model, group, max_new_tokens, temperature
        self.use_graphs = model.device.type == "cuda"
        self.stops = torch.tensor(stop_tokens, dtype=torch.long, device=model.device)
        self.batch: Batch | None = None

    def sample(self, prompts: list[list[int]], keys: list[tuple]) -> Rollout:
        """Responses to the prompts, with the random numbers of each prompt's key (runtime.torch_stream).

        Raises ValueError when a prompt is empty or a prompt and its response exceed the model's positions.
        """
        if not all(prompts):
            raise ValueError("cannot continue an empty prompt")
        G, T, device = self.group, self.max_new_tokens, self.model.device
        longest_prompt, limit = max(map(len, prompts)), self.model.config.max_position_embeddings
        if (most := longest_prompt + T) > limit:
            raise ValueError(f"prompt and response may take {most} tokens, more than the model's {limit} positions")

        noise = torch.cat([torch.rand(G, T, generator=torch_stream(*key)) for key in keys]).to(device)
        out = Rollout.empty(len(noise), T, device)
        # Prompts of like length share a batch: their responses tend to end together.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        step = min(self.groups_at_once(longest_prompt), math.ceil(len(prompts) / n_threads(device)))

        @torch.no_grad()  # for each thread by itself
        def decode(chosen: list[int]) -> None:
            rows = (torch.tensor(chosen, device=device)[:, None] * G + torch.arange(G, device=device)).flatten()
            drawn = self._batch(len(chosen), longest_prompt).run([prompts[i] for i in chosen], noise[rows])
            for name in ("tokens", "log_probs", "lengths"):
                getattr(out, name)[rows] = getattr(drawn, name)[: len(rows)]

        in_threads(decode, [by_length[i : i + step] for i in range(0, len(prompts), step)], device)
        T = int(out.lengths.max())
        mask = torch.arange(T, device=device) < out.lengths[:, None]  # rows went on after their stop token
        stopped = torch.isin(out.tokens.gather(1, out.lengths[:, None] - 1)[:, 0], self.stops)
        return Rollout(out.tokens[:, :T] * mask, out.lengths, out.log_probs[:, :T] * mask, stopped)

    def groups_at_once(self, longest: int) -> int:
        """How many groups are decoded together, by memory: what is free on a GPU, all there is on the CPU."""
        config, device = self.model.config, self.model.device
        tokens = longest + self.group * self.max_new_tokens
        size = 2 * config.num_hidden_layers * config.kv_size * self.model.dtype.itemsize
        if device.type == "cuda":
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            free = torch.cuda.mem_get_info(device)[0] + unused
            if self.batch is not None:  # what it holds can be used again
                free += self.batch.groups * (self.batch.longest + self.group * self.max_new_tokens) * size
        else:
            # A share of all there is, since what is free differs from call to call and small batches round otherwise.
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 4 / n_threads(device)
        return max(1, int(free / 2 / (tokens * size)))  # the other half is for logits, activations and training

    def _batch(self, groups: int, longest: int) -> "Batch":
        """A batch with room for so many groups and so long prompts; with graphs, the one there is if it has room."""
        if not self.use_graphs:
            return Batch(self, groups, longest)
        if self.batch is None or self.batch.groups < groups or self.batch.longest < longest:
            self.batch = None  # frees its memory first
            self.batch = Batch(self, groups, 32 * math.ceil(longest / 32))
        return self.batch


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens (B,) from logits (B, V) by inverting the distribution function at noise (B,) in [0, 1)."""
    log_p = log_softmax(logits, temperature or 1.0)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    else:
        below = log_p.exp().cumsum(-1)  # the first token above the noise: one of probability 0 is never that
        tokens = torch.searchsorted(below, noise[:, None] * below[:, -1:], right=True)[:, 0]
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # above the last where logits are NaN: log-probs are NaN then
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


def scores(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Attention scores (b, Tq, Tk) of queries (b, Tq, d) and keys (b, Tk, d), in fp32 as the trainer's kernels have
    them: Qwen2's biases make scores of a hundred, which 16 bits miss by a half."""
    k = k.transpose(1, 2)
    if q.device.type == "cuda" and q.dtype != torch.float32:
        return torch.add(bias, torch.bmm(q, k, out_dtype=torch.float32), alpha=scale)  # CUDA alone has it
    return torch.baddbmm(bias, q.float(), k.float(), alpha=scale)


class Batch:
    """P groups that are decoded together: their cache, the state of each row, and the step."""

    def __init__(self, sampler: Sampler, groups: int, longest: int):
        self.model, self.G, self.T = sampler.model, sampler.group, sampler.max_new_tokens
        self.temperature, self.stops, self.use_graphs = sampler.temperature, sampler.stops, sampler.use_graphs
        self.groups, self.longest = groups, longest
        config, rows, device = self.model.config, groups * self.G, self.model.device
        K, d, like = config.num_key_value_heads, config.head_dim, {"dtype": self.model.dtype, "device": device}
        layers = range(config.num_hidden_layers)
        self.way = self.choose_attention()
        new = torch.empty if self.way == "kernel" else torch.zeros  # others read what is masked
        self.prompt = [new(2, groups, K, longest, d, **like) for _ in layers]  # keys and values, (2, P, K, Tp, d)
        self.response = [new(2, rows, K, self.T, d, **like) for _ in layers]  # (2, P * G, K, T, d)
        self.lengths = torch.zeros(groups, dtype=torch.long, device=device)  # of the prompts, (P,)
        self.out = Rollout.empty(rows, self.T, device)
        self.rows = torch.arange(rows, device=device)  # where in `out` each row writes: rows move when groups leave
        self.tokens = torch.zeros(rows, dtype=torch.long, device=device)  # last drawn, (P * G,)
        self.running = torch.zeros(rows, dtype=torch.bool, device=device)
        self.noise = torch.zeros(rows, self.T, device=device)  # a number in [0, 1) for each token
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # number of the response token that is read next
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # of the memory of the graphs

    def choose_attention(self) -> str:
        if kernels.apply_to(self.model.lm_head.weight):
            return "kernel"
        on_gpu = self.model.device.type == "cuda" and self.model.dtype != torch.float32
        return "flash" if on_gpu and flash_attn_with_kvcache is not None else "matmul"

    def run(self, prompts: list[list[int]], noise: Tensor) -> Rollout:
        """Decode P prompts, for which there has to be room, drawing with noise (P * G, T).

        The first P * G rows of the result are theirs, until the next run; tokens behind a row's length do not count,
        and `stopped` is not filled in.
        """
        self.P = len(prompts)
        rows = self.P * self.G
        torch.arange(len(self.rows), out=self.rows)
        self.noise[:rows] = noise
        self.running.fill_(True)
        self.out.lengths.zero_()
        self.t.fill_(-1)
        self.draw(self.prefill(prompts).repeat_interleave(self.G, 0))
        for t in range(self.T - 1):
            self.read(t)
            if t % LOOK_EVERY == 0 and not self.shrink():
                break
        return self.out

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Run the prompts; their last hidden states (P, D)."""
        tokens, lengths = pad(prompts, self.model.device)
        self.lengths[: self.P] = lengths
        packed = pack_prompts(tokens, lengths)
        attend = packed_attention(packed, self.model)
        real = (torch.arange(self.longest, device=lengths.device) < lengths[:, None]).nonzero(as_tuple=True)

        def attend_and_store(layer: int, qkv: Tensor, rope: Rope) -> Tensor:
            _, *key_and_value = split_heads(qkv, rope, self.model.config)
            for side, x in zip(self.prompt[layer], key_and_value):
                side[: self.P].transpose(1, 2)[real] = x
            return attend(layer, qkv, rope)

        hidden = self.model(packed.tokens, packed.positions, attend_and_store)
        return hidden[lengths.cumsum(0) - 1]

    def read(self, t: int) -> None:
        """Read the responses' tokens number t and draw the next, on a GPU from a graph."""
        self.now = t  # for the host (the CPU kernel and `shrink`); a step on a GPU reads self.t
        quarter = max(16, math.ceil(self.T / 4))
        self.window = min(self.T, (t // quarter + 1) * quarter)  # cached tokens that the step looks at
        if not self.use_graphs:
            return self.step()
        key = self.P, self.window
        if key not in self.graphs:  # the first such step runs as it is, which lets libraries set themselves up
            self.graphs[key] = None
            return self.step()
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.pool):  # graphs run one at a time and may share memory
                self.step()
            self.pool = self.graphs[key].pool()
        self.graphs[key].replay()

    def step(self) -> None:
        """Read each row's last token and draw its next; touches nothing but tensors of fixed place and size."""
        rows = self.P * self.G
        positions = (self.lengths[: self.P, None] + self.t).expand(-1, self.G).flatten()
        device, Tp = positions.device, self.longest
        if self.way == "matmul":
            real = torch.arange(Tp, device=device) < self.lengths[: self.P, None]
            bias = torch.zeros(real.shape, device=device).masked_fill(~real, -torch.inf)
            self.prompt_bias = bias.repeat_interleave(self.model.config.num_key_value_heads, 0)[:, None]  # (P*K, 1, Tp)
            later = torch.arange(self.window, device=device) > self.t
            self.response_bias = torch.zeros(1, 1, self.window, device=device).masked_fill(later, -torch.inf)
        self.draw(self.model(self.tokens[:rows], positions, getattr(self, f"attend_by_{self.way}")))

    def draw(self, hidden: Tensor) -> None:
        """Draw a token for each row from its hidden state (P * G, D), and write it down."""
        n, rows = len(hidden), self.rows[: len(hidden)]
        self.t += 1  # the number of the token that is drawn, and read next
        noise = self.noise[:n].index_select(1, self.t)[:, 0]
        tokens, log_probs = draw(self.model.logits(hidden), noise, self.temperature)
        places = rows * self.T + self.t
        self.out.tokens.view(-1).index_copy_(0, places, tokens)
        self.out.log_probs.view(-1).index_copy_(0, places, log_probs)
        self.out.lengths.index_add_(0, rows, self.running[:n].long())
        self.running[:n] &= ~(tokens[:, None] == self.stops).any(1)
        self.tokens[:n] = tokens

    def shrink(self) -> bool:
        """Let finished groups leave, an eighth of the batch at a time; whether any row still runs."""
        going = self.running[: self.P * self.G].view(self.P, self.G).any(1)
        n_going, eighth = int(going.sum()), math.ceil(self.groups / 8)
        P = eighth * math.ceil(n_going / eighth)
        if 0 < P < self.P:
            kept = going.sort(descending=True, stable=True).indices[:P]
            kept_rows = (kept[:, None] * self.G + torch.arange(self.G, device=kept.device)).flatten()
            for whole in self.prompt:
                whole[:, :P] = whole[:, kept]
            for whole in self.response:  # tokens that are yet to come need no move
                whole[:, : P * self.G, :, : self.now + 1] = whole[:, kept_rows, :, : self.now + 1]
            self.lengths[:P] = self.lengths[kept]
            for state in (self.rows, self.tokens, self.running, self.noise):
                state[: P * self.G] = state[kept_rows]
            self.P = P
        return n_going > 0

    # How a step's tokens attend to the cache: three ways, equal to rounding

    def attend_by_kernel(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """On the CPU: one C function that rotates, stores and attends."""
        prompt, response = self.prompt[layer][:, : self.P], self.response[layer][:, : len(qkv)]
        return kernels.attend(qkv, rope, self.lengths[: self.P], prompt, response, self.now)

    def attend_by_matmul(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """PyTorch's operations, on any device."""
        q, *key_and_value = split_heads(qkv, rope, self.model.config)
        (B, H, d), P, G, K = q.shape, self.P, self.G, self.model.config.num_key_value_heads
        R, Tp, scale = H // K, self.longest, d**-0.5
        response = self.response[layer][:, :B]
        for side, x in zip(response, key_and_value):
            side.index_copy_(2, self.t, x[:, :, None])
        prompt_k, prompt_v = self.prompt[layer][:, :P].flatten(1, 2)  # (P * K, Tp, d)
        response_k, response_v = response[:, :, :, : self.window].flatten(1, 2)  # (B * K, W, d)

        # Heads that share a key head, and for the prompt also the rows of a group, are one matrix.
        shared = q.view(P, G, K, R, d).transpose(1, 2).reshape(P * K, G * R, d)
        own = q.reshape(B * K, R, d)
        to_prompt = scores(shared, prompt_k, self.prompt_bias, scale)
        to_response = scores(own, response_k, self.response_bias, scale)
        to_prompt = to_prompt.view(P, K, G, R, Tp).transpose(1, 2).reshape(B * K, R, Tp)
        weights = torch.cat((to_prompt, to_response), -1).softmax(-1).to(q.dtype)
        on_prompt = weights[..., :Tp].view(P, G, K, R, Tp).transpose(1, 2).reshape(P * K, G * R, Tp)
        mixed = torch.bmm(on_prompt, prompt_v).view(P, K, G, R, d).transpose(1, 2).reshape(B * K, R, d)
        return torch.baddbmm(mixed, weights[..., Tp:], response_v).view(B, H * d)

    def attend_by_flash(self, layer: int, qkv: Tensor, rope: Rope) -> Tensor:
        """flash-attn's decoding kernel, on prompts and on responses; their softmaxes are joined by their sums."""
        q, k, v = split_heads(qkv, rope, self.model.config)
        (B, H, d), P, G = q.shape, self.P, self.G
        prompt_k, prompt_v = self.prompt[layer][:, :P].transpose(2, 3)  # (P, Tp, K, d)
        response_k, response_v = self.response[layer][:, :B].transpose(2, 3)
        lengths, read = self.lengths[:P].int(), self.t.int().expand(B).contiguous()
        on_prompt, prompt_sums = flash_attn_with_kvcache(
            q.view(P, G, H, d), prompt_k, prompt_v, cache_seqlens=lengths, return_softmax_lse=True
        )  # (P, G, H, d), (P, H, G)
        on_response, response_sums = flash_attn_with_kvcache(
            q[:, None], response_k, response_v, k[:, None], v[:, None], cache_seqlens=read, return_softmax_lse=True
        )  # (B, 1, H, d), (B, H, 1); it stores k and v at `read` first
        share = torch.sigmoid(prompt_sums.transpose(1, 2).reshape(B, H) - response_sums[..., 0])[..., None]
        mixed = share * on_prompt.reshape(B, H, d) + (1 - share) * on_response[:, 0]
        return mixed.to(qkv.dtype).reshape(B, H * d)
