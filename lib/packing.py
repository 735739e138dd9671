"""Packed batches: prompts and responses without padding, each prompt computed once for its group.

    batch = pack(prompts, prompt_lengths, responses, response_lengths, prompt_index)
    logps, entropies = response_logps(model, batch, temperature, entropy=True)

N tokens lie one after the other in one row; attention masks what they must not see.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lib import kernels
from lib.attention import packed_attention
from lib.transformer import Transformer

TokenLists = list[list[int]]
MAX_LOGITS = {"cuda": 2**27, "cpu": 2**24}  # that exist at a time
LONG_PREFIX = 16  # tokens: a shorter prefix that all prompts share gets no segment of its own


def pad(rows: TokenLists, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Pad token lists on the right with zeros: return (B, T) and the lengths (B,)."""
    padded = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return padded.to(device), torch.tensor([len(row) for row in rows], device=device)


@dataclass
class Packed:
    """P prompts, then B responses, concatenated: N tokens in S segments.

    A prompt's tokens attend within the prompt, a response's to its prompt and to itself. Where all
    prompts begin alike, as chat templates do, one more segment of these `shared` tokens comes first
    and the prompts' have the rest. The last token of a response predicts nothing, so it is a target
    only. With prompt [a b c], responses [x y] and [z]:

        tokens         a b c x      (z is predicted, never read)
        logit_indices  2 3 2        (c, x and c predict)
        targets        x y z
    """

    tokens: Tensor  # (N,)
    positions: Tensor  # (N,)
    lengths: Tensor  # (S,) tokens of each segment
    prompt_index: Tensor  # (B,) the prompt of each response
    logit_indices: Tensor  # (M,) which token predicts each response token
    targets: Tensor  # (M,) the response tokens that are predicted, row by row
    shared: int = 0  # tokens of the segment before the prompts', which all of them continue


def shared_prefix(prompts: Tensor, lengths: Tensor) -> int:
    """Return how many tokens all prompts (P, Tp) begin with, each having more; 0 if too few."""
    if len(prompts) < 2 or prompts.shape[1] <= LONG_PREFIX:
        return 0
    alike = (prompts == prompts[0]).all(0).cumprod(0).sum()
    shared = int(torch.minimum(alike, lengths.min() - 1))
    return shared if shared >= LONG_PREFIX else 0


def pack(
    prompts: Tensor,
    prompt_lengths: Tensor,
    responses: Tensor,
    response_lengths: Tensor,
    prompt_index: Tensor,
    positions: tuple[Tensor, Tensor] | None = None,
) -> Packed:
    """Pack prompts (P, Tp) and responses (B, Tr), padded on the right, with their lengths.

    prompt_index (B,) is each response's prompt. RoPE positions (P, Tp) and (B, Tr) are consecutive
    unless given.
    """
    device, (P, Tp), (B, Tr) = prompts.device, prompts.shape, responses.shape
    shared = 0 if positions else shared_prefix(prompts, prompt_lengths)
    t, tp = torch.arange(Tr, device=device), torch.arange(Tp, device=device)
    prompt_mask = (tp >= shared) & (tp < prompt_lengths[:, None])  # (P, Tp)
    target_mask = t < response_lengths[:, None]  # (B, Tr)
    input_mask = t < response_lengths[:, None] - 1  # (B, Tr)
    n_before = shared + prompt_mask.sum()
    input_index = n_before + (input_mask.flatten().cumsum(0) - 1).view(B, Tr)
    if positions is None:
        positions = tp.expand(P, Tp), prompt_lengths[prompt_index][:, None] + t
    # Prefix, prompts, responses: what is shared comes first, if anything is
    prefix_length = prompt_lengths.new_tensor([shared] if shared else [])
    tokens = torch.cat((prompts[0, :shared], prompts[prompt_mask], responses[input_mask]))  # (N,)
    packed_positions = torch.cat((tp[:shared], positions[0][prompt_mask], positions[1][input_mask]))
    lengths = torch.cat((prefix_length, prompt_lengths - shared, response_lengths - 1))  # (S,)
    last_of_prompt = last_tokens(prompt_lengths, shared)[prompt_index][:, None]  # (B, 1)
    predictors = torch.cat((last_of_prompt, input_index[:, :-1]), 1)  # (B, Tr)
    logit_indices, targets = predictors[target_mask], responses[target_mask]  # (M,) each
    return Packed(tokens, packed_positions, lengths, prompt_index, logit_indices, targets, shared)


def last_tokens(prompt_lengths: Tensor, shared: int) -> Tensor:
    """Return where the prompts' last tokens (P,) lie in a packed batch."""
    return shared + (prompt_lengths - shared).cumsum(0) - 1


def pack_prompts(prompts: Tensor, lengths: Tensor) -> Packed:
    """Pack prompts (P, Tp) of the given lengths (P,), without responses."""
    none = lengths[:0]
    return pack(prompts, lengths, none[:, None], none, none)


def pack_examples(
    prompts: TokenLists, responses: TokenLists, device: torch.device, gaps: list | None = None
) -> Packed:
    """Pack prompts, each with one response; `gaps` are random_position_gaps' arguments for each."""
    index, positions = torch.arange(len(prompts), device=device), None
    if gaps:
        rows = [random_position_gaps(p, r, *how) for p, r, how in zip(prompts, responses, gaps)]
        positions = tuple(pad(list(column), device)[0] for column in zip(*rows))
    return pack(*pad(prompts, device), *pad(responses, device), index, positions)


def random_position_gaps(
    prompt: list[int], response: list[int], starts: Tensor, max_gap: int, generator
) -> tuple[list[int], list[int]]:
    """Return positions of both, with random gaps before tokens `starts`, up to `max_gap` in all.

    Without gaps, a model trained on short chains finds steps by their distance and knows when to
    stop by counting lines, and fails on longer chains; with gaps it must go by the labels (arXiv
    2305.16843).
    """
    tokens = torch.tensor(prompt + response)
    weights = torch.rand(len(tokens), generator=generator) * torch.isin(tokens, starts)
    total = torch.rand(1, generator=generator) * max_gap
    gaps = (weights.cumsum(0) / weights.sum().clamp(min=1e-9) * total).long()  # without starts: 0
    positions = (torch.arange(len(tokens)) + gaps).tolist()
    return positions[: len(prompt)], positions[len(prompt) :]


def micro_batches(
    prompt_lengths: Tensor, response_lengths: Tensor, active: Tensor, budget: int, workers: int = 1
) -> list[Tensor]:
    """Split the groups `active` into micro-batches of at most `budget` tokens: their indices.

    prompt_lengths (P,), response_lengths (P, G), active: indices into P. A group larger than the
    budget is a micro-batch of its own. A prefix that all prompts share is counted for each of them,
    so costs are upper bounds. Micro-batches are of similar size; each worker gets the same number
    of them, unless whole groups fill the budget badly.
    """
    costs = (prompt_lengths + response_lengths.sum(1))[active].tolist()
    n = workers * math.ceil(sum(costs) / (workers * budget))
    share = sum(costs) / max(1, n)  # of tokens
    sizes, total, before = [], 0, 0  # groups of each, tokens of the last one and of all
    for cost in costs:
        # A group whose middle lies beyond this one's share begins the next
        if total + cost > budget or before + cost / 2 > share * len(sizes):
            sizes.append(0)
            total = 0
        sizes[-1] += 1
        total, before = total + cost, before + cost
    return list(active.split(sizes))


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return log-probs (N, V) in fp32; without the division at T=1, which would copy the logits."""
    logits = logits.float()
    return (logits if temperature == 1 else logits / temperature).log_softmax(-1)


def response_logps(
    model: Transformer,
    batch: Packed,
    temperature: float = 1.0,
    entropy: bool = False,
    dropout_key: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return log-probs (M,) of the response tokens, and their entropies (M,) if asked for.

    `temperature` is the sampler's. Entropies carry no gradient. At most MAX_LOGITS logits exist at
    a time, so that memory does not grow with tokens x vocabulary.
    """
    attend = packed_attention(batch, model)
    hidden = model(batch.tokens, batch.positions, attend, dropout_key)  # (N, D)
    weight = model.head_weight()
    trained = weight.requires_grad and torch.is_grad_enabled()
    gradient_of = weight.float() if weight.is_cuda and trained else None

    def head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        by_kernel = kernels.apply_to(hidden)
        logits = model.logits(hidden, gradient_of, in_fp32=not by_kernel)
        if by_kernel:
            logps, entropies = kernels.token_logps(logits, targets, temperature)
            return logps, entropies if entropy else entropies[:0]
        log_p = log_softmax(logits, temperature)
        del logits  # as large as log_p
        logps = log_p.gather(1, targets[:, None])[:, 0]
        with torch.no_grad():  # last: the backward pass recomputes only what comes before
            return logps, -(log_p.exp() * log_p).sum(-1) if entropy else logps.detach()[:0]

    def chunk_logps(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if not trained and hidden.requires_grad:
            return FrozenHead.apply(hidden, head, targets)
        return checkpoint(head, hidden, targets, use_reentrant=False)

    chunk = max(1, MAX_LOGITS[hidden.device.type] // model.config.vocab_size)
    chunk -= chunk % 64 if chunk > 256 else 0  # which need no extra rows
    predictors = hidden.index_select(0, batch.logit_indices).split(chunk)
    outputs = [chunk_logps(h, t) for h, t in zip(predictors, batch.targets.split(chunk))]
    return tuple(map(torch.cat, zip(*outputs)))


class FrozenHead(torch.autograd.Function):
    """Log-probs and entropies by a head that is not trained.

    The forward pass already computes each log-prob's gradient by its hidden state. The backward
    pass only scales it, and needs no logits.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, head: Callable, targets: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            logps, entropies = head(hidden, targets)
            ctx.save_for_backward(*torch.autograd.grad(logps.sum(), hidden))
        ctx.mark_non_differentiable(entropies)
        return logps.detach(), entropies

    @staticmethod
    def backward(ctx, d_logps: Tensor, _) -> tuple[Tensor, None, None]:
        (slopes,) = ctx.saved_tensors  # (n, D)
        return (d_logps[:, None] * slopes).to(slopes.dtype), None, None
