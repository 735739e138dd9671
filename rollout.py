"""Batched sampling: P prompts, G responses to each, with their log-probs.

The cache has two parts. A prompt's keys and values are computed and kept once for its whole group; a response's
lie in a contiguous buffer in which all rows stand at the same step, so that prompts of any length need no left
padding. One softmax runs over both parts. Groups that have finished leave the batch.

Every row owns its random numbers (one uniform a token, drawn before the first step), so what a row says depends
neither on the rows beside it nor on how the work is split into batches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model import Attend, Transformer, pack, packed_attention, pad


@dataclass
class Rollout:
    """B = P * G responses; the group of prompt i is the rows i * G to (i + 1) * G - 1."""

    tokens: Tensor  # (B, T) padded on the right with zeros
    lengths: Tensor  # (B,) the stop token included
    log_probs: Tensor  # (B, T) under the distribution each token was sampled from; 0 where padded
    stopped: Tensor  # (B,) False where max_new_tokens cut the response off

    def responses(self) -> list[list[int]]:
        """The tokens of each response, its stop token left out."""
        lengths = (self.lengths - self.stopped.long()).tolist()
        return [row[:n] for row, n in zip(self.tokens.tolist(), lengths)]


@torch.no_grad()
def sample(
    model: Transformer,
    prompts: list[list[int]],
    stop_tokens: list[int],
    generator: torch.Generator,
    group: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    max_rows: int = 512,
) -> Rollout:
    """Sample `group` responses to each prompt; temperature 0 takes the likeliest token (log-probs then at 1).

    At most about `max_rows` rows are decoded at a time. `generator` is a CPU generator, on any device.
    Raises ValueError when a prompt is empty or a prompt and its response exceed the model's positions.
    """
    if not all(prompts):
        raise ValueError("cannot continue an empty prompt")
    longest, limit = max(map(len, prompts)) + max_new_tokens, model.config.max_position_embeddings
    if longest > limit:
        raise ValueError(f"prompt and response may take {longest} tokens, more than the model's {limit} positions")
    device = model.lm_head.weight.device
    noise = torch.rand(len(prompts) * group, max_new_tokens, generator=generator).to(device)
    stops = torch.tensor(stop_tokens, device=device)

    shape = (len(prompts), group, max_new_tokens)
    out = Rollout(
        tokens=torch.zeros(shape, dtype=torch.long, device=device),
        lengths=torch.full(shape[:2], max_new_tokens, device=device),
        log_probs=torch.zeros(shape, device=device),
        stopped=torch.zeros(shape[:2], dtype=torch.bool, device=device),
    )
    # Prompts of like length share a batch: their responses tend to end together.
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    step = max(1, max_rows // group)
    for first in range(0, len(prompts), step):
        chosen = by_length[first : first + step]
        rows = torch.tensor(chosen, device=device)
        _decode([prompts[i] for i in chosen], rows, noise.view(shape), model, stops, temperature, out)

    T = int(out.lengths.max())
    return Rollout(
        out.tokens.flatten(0, 1)[:, :T],
        out.lengths.flatten(),
        out.log_probs.flatten(0, 1)[:, :T],
        out.stopped.flatten(),
    )


def _decode(
    prompts: list[list[int]],
    rows: Tensor,
    noise: Tensor,
    model: Transformer,
    stops: Tensor,
    temperature: float,
    out: Rollout,
) -> None:
    """Fill the rows `rows` (P,) of `out`, whose fields are (prompts, G, ...) here; noise (prompts, G, T)."""
    cache = Cache(model, prompts, noise.shape[1:], noise.device)
    _, G, T = noise.shape
    hidden = cache.prefill(model).repeat_interleave(G, 0)  # (P * G, D)
    running = torch.ones(len(rows), G, dtype=torch.bool, device=noise.device)

    for t in range(T):
        tokens, log_probs = draw(model.logits(hidden), noise[rows, :, t].flatten(), temperature)
        tokens, log_probs = tokens.view(-1, G), log_probs.view(-1, G)
        out.tokens[rows, :, t] = tokens * running
        out.log_probs[rows, :, t] = log_probs * running
        ends = running & torch.isin(tokens, stops)
        out.lengths[rows] = torch.where(ends, t + 1, out.lengths[rows])
        out.stopped[rows] |= ends
        running = running & ~ends

        going = running.any(1)  # (P,) groups of which a row still runs
        n_going = int(going.sum())
        if n_going == 0 or t == T - 1:
            return
        if n_going <= 0.9 * len(rows):  # moving the cache pays only when enough groups leave
            rows, running, tokens = rows[going], running[going], tokens[going]
            cache.keep(going)
        hidden = cache.step(model, tokens.flatten(), t)


def draw(logits: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample tokens (B,) from logits (B, V) by inverting the distribution function at noise (B,) in [0, 1)."""
    log_p = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = log_p.argmax(-1)
    else:
        below = log_p.exp().cumsum(-1)  # the first token above the noise: one of probability 0 is never that
        tokens = torch.searchsorted(below, noise[:, None] * below[:, -1:], right=True)[:, 0]
    return tokens, log_p.gather(1, tokens[:, None])[:, 0]


class Cache:
    """Keys and values of P prompts and of their P * G responses of up to T tokens, for each layer."""

    def __init__(self, model: Transformer, prompts: list[list[int]], shape: tuple[int, int], device: torch.device):
        config, (self.group, T) = model.config, shape
        self.prompts, self.lengths = pad(prompts, device)  # (P, Tp), (P,)
        P, Tp = self.prompts.shape
        K, d = config.num_key_value_heads, config.head_dim
        like = {"dtype": model.lm_head.weight.dtype, "device": device}
        layers = range(config.num_hidden_layers)
        self.prompt = [torch.zeros(2, P, K, Tp, d, **like) for _ in layers]  # keys and values
        self.response = [torch.zeros(2, P * self.group, K, T, d, **like) for _ in layers]
        self.real = torch.arange(Tp, device=device) < self.lengths[:, None]  # (P, Tp) not padding
        self.bias = torch.zeros(P, 1, 1, Tp, **like).masked_fill(~self.real[:, None, None], -torch.inf)

    def prefill(self, model: Transformer) -> Tensor:
        """Run the prompts; their last hidden states (P, D)."""
        P = len(self.prompts)
        none = self.lengths[:0]
        batch = pack(self.prompts, self.lengths, none[:, None], none, none)
        attend = packed_attention(batch)

        def attend_and_store(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for side, x in zip(self.prompt[layer], (k, v)):
                side.transpose(1, 2)[self.real] = x
            return attend(layer, q, k, v)

        hidden = model(batch.tokens, batch.positions, attend_and_store)
        return hidden[self.lengths.cumsum(0) - 1].view(P, -1)

    def step(self, model: Transformer, tokens: Tensor, t: int) -> Tensor:
        """Read tokens (P * G,), the responses' number t; their hidden states (P * G, D)."""
        positions = (self.lengths + t).repeat_interleave(self.group)
        return model(tokens, positions, self._attend_at(t))

    def _attend_at(self, t: int) -> Attend:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            B, H, d = q.shape
            P, K = len(self.prompts), k.shape[1]
            prompt_k, prompt_v = self.prompt[layer]  # (P, K, Tp, d)
            self.response[layer][0][:, :, t], self.response[layer][1][:, :, t] = k, v
            response_k, response_v = self.response[layer][:, :, :, : t + 1]  # (B, K, t + 1, d)

            # Heads that share a key head, and for the prompt also the rows of a group, are one matrix.
            own = (q * d**-0.5).view(B, K, H // K, d)
            shared = own.view(P, self.group, K, -1, d).transpose(1, 2).reshape(P, K, -1, d)  # (P, K, G * H/K, d)
            to_prompt = shared @ prompt_k.transpose(2, 3) + self.bias
            to_prompt = (
                to_prompt.view(P, K, self.group, -1, to_prompt.shape[-1]).transpose(1, 2).reshape(B, K, H // K, -1)
            )
            to_response = own @ response_k.transpose(2, 3)
            weights = torch.cat((to_prompt, to_response), -1).float().softmax(-1).to(v.dtype)

            Tp = prompt_k.shape[2]
            on_prompt = weights[..., :Tp].view(P, self.group, K, -1, Tp).transpose(1, 2).reshape(P, K, -1, Tp)
            mixed = (on_prompt @ prompt_v).view(P, K, self.group, -1, d).transpose(1, 2).reshape(B, K, H // K, d)
            return (mixed + weights[..., Tp:] @ response_v).reshape(B, H, d)

        return attend

    def keep(self, going: Tensor) -> None:
        """Drop the groups that are False in `going` (P,)."""
        rows = going.repeat_interleave(self.group)
        self.prompts, self.lengths, self.real, self.bias = (
            x[going] for x in (self.prompts, self.lengths, self.real, self.bias)
        )
        self.prompt = [x[:, going] for x in self.prompt]
        self.response = [x[:, rows] for x in self.response]
