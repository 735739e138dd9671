"""The sampler: P prompts, G responses to each, with their log-probs.

    sampler = Sampler(policy, stop_tokens, group_size, max_new_tokens, temperature)
    rollout = sampler.sample(prompts, keys)       # token lists, one RNG key each -> Rollout

How it is fast:
- The KV cache holds each prompt once for its whole group, and all responses at the same step.
- Groups that have finished leave the batch; prompts for which there is no memory wait.
- A decoding step reads and writes tensors at fixed addresses and never waits for the device, so on
  a GPU it is captured in CUDA graphs, one for each batch size and number of cached tokens it reads.
  The host looks at which groups have finished only every few steps.

Every prompt has its own random numbers: one uniform for each token of its group, drawn before the
first step. So its responses do not depend on which prompts share its batch or rank.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lib import fused, kernels
from lib.attention import KVCache, cache_bytes, packed_attention
from lib.distributed import in_threads, n_threads
from lib.memory import free_bytes, prefill_bytes
from lib.packing import Packed, last_tokens, log_softmax, pack, pack_prompts, pad
from lib.rng import torch_rng
from lib.transformer import Transformer

CHECK_FINISHED_EVERY = 4  # steps
BLOCK = 512  # tokens: in a larger vocabulary first a block is drawn, then a token in it


@dataclass
class Rollout:
    """P prompts and B = P * G responses: rows i * G to (i + 1) * G - 1 answer prompt i."""

    prompts: Tensor  # (P, Tp) tokens, padded on the right with zeros
    prompt_lengths: Tensor  # (P,)
    tokens: Tensor  # (B, T) responses, padded on the right with zeros
    lengths: Tensor  # (B,) the stop token included
    logps: Tensor  # (B, T) under the distribution each token was sampled from; 0 where padded
    stopped: Tensor  # (B,) False where max_new_tokens cut the response off
    max_new_tokens: int = 0  # the most that a response could take
    problems: list | None = None  # P, once scored
    scored: list | None = None  # P lists of G responses: tags and rewards
    rewards: Tensor | None = None  # (P, G)
    advantages: Tensor | None = None  # (P, G)

    def pack(self, groups: Tensor) -> tuple[Packed, Tensor, Tensor]:
        """Pack the groups (p,); also return each token's log-prob and its response, (M,) each."""
        rows = rows_of(groups, len(self.tokens) // len(self.prompts))  # (p * G,)
        index = torch.arange(len(groups), device=groups.device)
        prompt_index = index.repeat_interleave(len(rows) // len(groups))
        prompts, prompt_lengths = self.prompts[groups], self.prompt_lengths[groups]
        tokens, lengths = self.tokens[rows], self.lengths[rows]
        packed = pack(prompts, prompt_lengths, tokens, lengths, prompt_index)
        mask = torch.arange(tokens.shape[1], device=rows.device) < lengths[:, None]
        return packed, self.logps[rows][mask], rows.repeat_interleave(lengths)

    def has_signal(self) -> Tensor:
        """Return which groups (P,) have rewards that differ."""
        return (self.rewards != self.rewards[:, :1]).any(1)

    def with_groups(self, groups: list[int], other: "Rollout") -> "Rollout":
        """Return this rollout with `groups` (p) replaced by other's p groups; both are scored."""
        index = torch.tensor(groups, device=self.tokens.device)
        new = replace(self, problems=list(self.problems), scored=list(self.scored))
        for i, problem, scored in zip(groups, other.problems, other.scored):
            new.problems[i], new.scored[i] = problem, scored
        tensors = [name for name, x in vars(self).items() if isinstance(x, Tensor)]
        for name in tensors:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine.ndim == 2:  # as wide as the wider one
                width = max(mine.shape[1], theirs.shape[1])
                mine, theirs = (F.pad(x, (0, width - x.shape[1])) for x in (mine, theirs))
            of_prompts = len(mine) == len(self.prompts)
            rows = index if of_prompts else rows_of(index, self.rewards.shape[1])
            setattr(new, name, mine.index_copy(0, rows, theirs))
        return new

    def response_tokens(self) -> list[list[int]]:
        """Return the tokens of each response, without its stop token."""
        lengths = (self.lengths - self.stopped.long()).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths)]


class Sampler:
    """Samples with a model's current weights; on a GPU it keeps cache and graphs between calls."""

    def __init__(
        self,
        model: Transformer,
        stop_tokens: list[int],
        group_size: int = 1,
        max_new_tokens: int = 128,
        temperature: float = 1.0,  # 0: the likeliest token, with its log-prob at temperature 1
        reserve: Callable[[], int] = lambda: 0,  # bytes of a GPU that the cache leaves free
    ):
        self.model, self.group_size = model, group_size
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.reserve, self.use_graphs = reserve, model.device.type == "cuda"
        self.stops = torch.tensor(stop_tokens, dtype=torch.long, device=model.device)
        self.batch: DecodeBatch | None = None

    def sample(self, prompts: list[list[int]], keys: list[tuple]) -> Rollout:
        """Sample G responses to each of P prompts, with the random numbers of its key.

        Raises ValueError if a prompt is empty, or if a prompt and its response would exceed the
        model's positions.
        """
        G, T, device = self.group_size, self.max_new_tokens, self.model.device
        if not all(prompts):
            raise ValueError("cannot continue an empty prompt")
        max_prompt_len = max(map(len, prompts))
        total, limit = max_prompt_len + T, self.model.config.max_position_embeddings
        if total > limit:
            raise ValueError(f"prompt and response may take {total} of {limit} positions")

        padded, prompt_lengths = pad(prompts, device)  # (P, Tp), (P,)
        uniforms = [torch.rand(G, T, generator=torch_rng(*key)) for key in keys]
        uniforms = torch.cat(uniforms).to(device)  # (B, T)
        logps, tokens = torch.zeros_like(uniforms), torch.zeros_like(uniforms, dtype=torch.long)

        @torch.no_grad()  # in each thread
        def decode(chosen: list[int]) -> None:
            groups = torch.tensor(chosen, device=device)
            rows = rows_of(groups, G)
            batch = self._batch(len(chosen), max_prompt_len)
            batch.generate(padded[groups], prompt_lengths[groups], uniforms[rows])
            tokens[rows] = batch.out_tokens[: len(rows)]
            logps[rows] = batch.out_logps[: len(rows)]

        # Prompts of similar length share a batch: their responses tend to end together.
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        n = min(self.max_groups(max_prompt_len), math.ceil(len(prompts) / n_threads(device)))
        in_threads(decode, [by_length[i : i + n] for i in range(0, len(prompts), n)], device)

        # Rows went on after their stop token until their whole group had finished.
        is_stop = torch.isin(tokens, self.stops)  # (B, T)
        stopped = is_stop.any(1)
        lengths = torch.where(stopped, is_stop.int().argmax(1) + 1, T)  # argmax: of the first one
        longest = int(lengths.max())
        mask = torch.arange(longest, device=device) < lengths[:, None]
        tokens, logps = tokens[:, :longest] * mask, logps[:, :longest] * mask
        return Rollout(padded, prompt_lengths, tokens, lengths, logps, stopped, self.max_new_tokens)

    def max_groups(self, max_prompt_len: int) -> int:
        """Return how many groups share a batch: cache and prefill each take half of free memory."""
        shape = self.group_size, max_prompt_len, self.max_new_tokens
        free = free_bytes(self.model.device) - self.reserve()
        free += self.batch.cache.n_bytes if self.batch else 0  # which can be used again
        of_prompt = max_prompt_len * prefill_bytes(self.model)
        return max(1, int(free / 2 / max(cache_bytes(self.model, 1, *shape), of_prompt)))

    def _batch(self, groups: int, max_prompt_len: int) -> "DecodeBatch":
        """Return a batch with this capacity; with CUDA graphs, the existing one if it is enough."""
        if not self.use_graphs:
            return DecodeBatch(self, groups, max_prompt_len)
        cache = self.batch and self.batch.cache
        if cache is None or cache.groups < groups or cache.max_prompt_len < max_prompt_len:
            self.batch = cache = None  # frees its memory first
            self.batch = DecodeBatch(self, groups, 32 * math.ceil(max_prompt_len / 32))
        return self.batch


def rows_of(groups: Tensor, G: int) -> Tensor:
    """Return the rows (P * G,) of groups (P,)."""
    return (groups[:, None] * G + torch.arange(G, device=groups.device)).flatten()


def sample_tokens(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens from logits (B, V) by inverse CDF at uniforms (B,); return log-probs, too."""
    if temperature == 0:
        logps, tokens = log_softmax(logits, 1.0).max(-1)
        return tokens, logps
    if logits.shape[1] <= BLOCK:
        return invert_cdf(logits, uniforms, temperature)[:2]
    # One of some hundred blocks, then one of its tokens: a single pass over the logits.
    block_logits = fused.block_logits(logits, temperature, BLOCK)  # (B, V / BLOCK)
    blocks, block_logps, rest = invert_cdf(block_logits, uniforms, 1.0)
    index = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=logits.device)  # (B, BLOCK)
    inside = logits.gather(1, index.clamp(max=logits.shape[1] - 1))
    inside = inside.masked_fill(index >= logits.shape[1], -torch.inf)
    tokens, logps, _ = invert_cdf(inside, rest, temperature)
    return (blocks * BLOCK + tokens).clamp(max=logits.shape[1] - 1), block_logps + logps


def invert_cdf(logits: Tensor, uniforms: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Return the indices (B,) where the CDF of logits (B, n) passes uniforms (B,), their log-probs,
    and how far each uniform lies, from 0 to 1, into its index's interval: that is uniform again."""
    log_p = log_softmax(logits, temperature)
    cdf = log_p.exp().cumsum(-1)
    target = uniforms[:, None] * cdf[:, -1:]
    # right=True, so what has probability zero is never chosen. NaN logits: NaN log-probs.
    index = torch.searchsorted(cdf, target, right=True).clamp(max=logits.shape[1] - 1)  # (B, 1)
    logps = log_p.gather(1, index)
    rests = ((target - cdf.gather(1, index)) / logps.exp() + 1).clamp(0, 1 - 2**-24)
    return index[:, 0], logps[:, 0], rests[:, 0]


class DecodeBatch:
    """P groups that are decoded together: their cache and the state of each row."""

    def __init__(self, sampler: Sampler, groups: int, max_prompt_len: int):
        self.model, self.G, self.T = sampler.model, sampler.group_size, sampler.max_new_tokens
        self.temperature, self.stops = sampler.temperature, sampler.stops
        self.use_graphs, self.capacity = sampler.use_graphs, groups
        self.cache = KVCache(self.model, groups, self.G, max_prompt_len, self.T)
        B, device = groups * self.G, self.model.device
        self.out_tokens = torch.zeros(B, self.T, dtype=torch.long, device=device)
        self.out_logps, self.uniforms = (torch.zeros(B, self.T, device=device) for _ in range(2))
        self.last_tokens = torch.zeros(B, dtype=torch.long, device=device)
        self.out_rows = torch.arange(B, device=device)  # where each row writes: rows move
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.graph_pool = None  # memory that the graphs share

    def generate(self, prompts: Tensor, prompt_lengths: Tensor, uniforms: Tensor) -> None:
        """Decode prompts (P, Tp) with uniforms (P * G, T).

        Rows 0 to P * G - 1 of out_tokens and out_logps are theirs until the next call. What stands
        behind a row's first stop token does not count.
        """
        self.P = len(prompts)
        B = self.P * self.G
        torch.arange(len(self.out_rows), out=self.out_rows)
        self.uniforms[:B] = uniforms

        hidden = self.prefill(prompts, prompt_lengths)  # (P, D)
        self.write_token(hidden.repeat_interleave(self.G, 0))
        for t in range(self.T - 1):
            self.decode_step(t)
            if t % CHECK_FINISHED_EVERY == 0 and not self.drop_finished(t):
                break

    def prefill(self, prompts: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Run the packed prompts, store keys and values; return the last hidden states (P, D)."""
        self.cache.start(prompt_lengths)
        packed = pack_prompts(prompts, prompt_lengths)
        attend = self.cache.store_prompts(packed, packed_attention(packed, self.model))
        hidden = self.model(packed.tokens, packed.positions, attend)  # (N, D)
        return hidden[last_tokens(prompt_lengths, packed.shared)]

    def decode_step(self, t: int) -> None:
        """Read response token `t` of each row and sample the next, on a GPU from a graph."""
        window = self.cache.window_at(t)
        if not self.use_graphs:
            return self.forward_one_token(t, window)
        key = self.P, window
        if key not in self.graphs:  # first call: eager warm-up before capture
            self.graphs[key] = None
            return self.forward_one_token(t, window)
        if self.graphs[key] is None:
            self.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[key], pool=self.graph_pool):
                self.forward_one_token(t, window)
            self.graph_pool = self.graphs[key].pool()  # graphs run one at a time and may share it
        self.graphs[key].replay()

    def forward_one_token(self, t: int, window: int) -> None:
        """Run the model on each row's last token; touches only tensors at fixed addresses."""
        positions = self.cache.prompt_lengths[: self.P, None] + self.cache.t  # (P, 1)
        positions = positions.expand(-1, self.G).flatten()  # (P * G,)
        attend = self.cache.start_step(t, window)
        hidden = self.model(self.last_tokens[: len(positions)], positions, attend)
        self.write_token(hidden)

    def write_token(self, hidden: Tensor) -> None:
        """Sample a token for each row from its hidden state (P * G, D), and record it."""
        self.cache.t += 1  # in place: the number of the token that is sampled, and read next
        B, t = len(hidden), self.cache.t
        uniforms = self.uniforms[:B].index_select(1, t)[:, 0]
        logits = self.model.logits(hidden, in_fp32=not kernels.apply_to(hidden))  # (B, V)
        tokens, logps = sample_tokens(logits, uniforms, self.temperature)
        flat_index = self.out_rows[:B] * self.T + t
        self.out_tokens.view(-1).index_copy_(0, flat_index, tokens)
        self.out_logps.view(-1).index_copy_(0, flat_index, logps)
        self.last_tokens[:B] = tokens

    def drop_finished(self, t: int) -> bool:
        """Drop finished groups, an eighth of the batch at a time; return whether any is active."""
        tokens = self.out_tokens[self.out_rows[: self.P * self.G], : t + 2]  # all sampled so far
        stopped = torch.isin(tokens, self.stops).any(1)  # (P * G,)
        active = ~stopped.view(self.P, self.G).all(1)  # (P,)
        n_active, eighth = int(active.sum()), math.ceil(self.capacity / 8)
        P = eighth * math.ceil(n_active / eighth)
        if 0 < P < self.P:
            groups = active.sort(descending=True, stable=True).indices[:P]
            rows = rows_of(groups, self.G)
            self.cache.keep(groups, rows, t + 1)
            for state in (self.out_rows, self.last_tokens, self.uniforms):
                state[: len(rows)] = state[rows]
            self.P = P
        return n_active > 0
