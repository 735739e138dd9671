"""The sampler against sampling one whole sequence at a time, and its log-probs against the trainer's."""

import pytest
import torch
from conftest import small_model

from model import pack, packed_attention, pad, response_log_probs
from rollout import Rollout, draw, sample

STOP = [1]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def next_logits(model, row):
    none = torch.zeros(0, dtype=torch.long)
    batch = pack(*pad([row]), none[:, None], none, none)
    return model.logits(model(batch.tokens, batch.positions, packed_attention(batch))[-1:])


def naive(model, prompts, noise, group, max_new_tokens, temperature) -> Rollout:
    """The same sampling without cache or batch."""
    tokens = torch.zeros(len(prompts) * group, max_new_tokens, dtype=torch.long)
    log_probs = torch.zeros(tokens.shape)
    lengths, stopped = [], []
    for i in range(len(tokens)):
        row = list(prompts[i // group])
        for t in range(max_new_tokens):
            token, log_prob = draw(next_logits(model, row), noise[i, t : t + 1], temperature)
            tokens[i, t], log_probs[i, t] = token, log_prob
            row.append(int(token))
            if int(token) in STOP:
                break
        lengths.append(t + 1)
        stopped.append(int(token) in STOP)
    T = max(lengths)
    return Rollout(tokens[:, :T], torch.tensor(lengths), log_probs[:, :T], torch.tensor(stopped))


PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3, 3, 3, 3, 3, 3, 3, 3]]


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("group", [1, 3])
def test_equals_sampling_one_sequence_at_a_time(model, temperature, group):
    """Ragged prompts, rows that stop at different times, groups that leave: the same tokens, the same log-probs."""
    rollout = sample(model, PROMPTS, STOP, generator(), group, 12, temperature)
    noise = torch.rand(len(PROMPTS) * group, 12, generator=generator())
    expected = naive(model, PROMPTS, noise, group, 12, temperature)
    assert torch.equal(rollout.tokens, expected.tokens)
    assert torch.equal(rollout.lengths, expected.lengths)
    assert torch.equal(rollout.stopped, expected.stopped)
    torch.testing.assert_close(rollout.log_probs, expected.log_probs, atol=1e-5, rtol=0)


def stopping_model():
    """A model in which most rows meet the stop token early, at different steps."""
    model = small_model(seed=3, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[1] += 0.25 * model.model.norm.weight
    return model


def test_groups_that_finish_leave_the_others_as_they_are():
    model = stopping_model()
    prompts = [[3 + i % 5] * (1 + i % 4) for i in range(12)]
    rollout = sample(model, prompts, STOP, generator(), 2, 40)
    assert rollout.lengths.unique().numel() > 4, "the test needs rows that end at different times"
    noise = torch.rand(24, 40, generator=generator())
    expected = naive(model, prompts, noise, 2, 40, 1.0)
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(rollout.lengths, expected.lengths)


@pytest.mark.parametrize("max_rows", [1, 3, 8, 100])
def test_the_split_into_batches_does_not_matter(model, max_rows):
    whole = sample(model, PROMPTS, STOP, generator(), 3, 12)
    parts = sample(model, PROMPTS, STOP, generator(), 3, 12, max_rows=max_rows)
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.lengths, parts.lengths)
    torch.testing.assert_close(whole.log_probs, parts.log_probs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_log_probs_equal_the_trainers_at_any_temperature(model, temperature):
    rollout = sample(model, PROMPTS, STOP, generator(), 4, 20, temperature)
    parents = torch.arange(len(PROMPTS)).repeat_interleave(4)
    batch = pack(*pad(PROMPTS), rollout.tokens, rollout.lengths, parents)
    log_probs, _ = response_log_probs(model, batch, temperature)
    mask = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    assert (log_probs - rollout.log_probs[mask]).abs().max() < 1e-4
    assert (rollout.log_probs[~mask] == 0).all()


def test_the_stop_token_counts_and_nothing_follows_it():
    rollout = sample(stopping_model(), PROMPTS, STOP, generator(), 8, 40)
    for tokens, length, stopped in zip(rollout.tokens, rollout.lengths, rollout.stopped):
        assert (tokens[length - 1] == 1) == stopped
        assert (tokens[: length - 1] != 1).all() and (tokens[length:] == 0).all()
    assert rollout.stopped.any()


def test_all_rows_ending_at_once_and_at_the_first_token(model):
    everything = list(range(model.config.vocab_size))
    rollout = sample(model, PROMPTS, everything, generator(), 2, 12)
    assert rollout.tokens.shape == (8, 1) and rollout.lengths.eq(1).all() and rollout.stopped.all()


def test_cut_off_responses_are_marked(model):
    rollout = sample(model, PROMPTS, [], generator(), 2, 5)
    assert rollout.lengths.eq(5).all() and not rollout.stopped.any()


def test_greedy_needs_no_luck(model):
    a = sample(model, PROMPTS, STOP, generator(0), 1, 12, temperature=0.0)
    b = sample(model, PROMPTS, STOP, generator(1), 1, 12, temperature=0.0)
    assert torch.equal(a.tokens, b.tokens)


def test_draw_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    noise = (torch.arange(4000) + 0.5) / 4000
    tokens, log_probs = draw(logits.expand(4000, 4), noise, temperature=0.5)
    shares = torch.bincount(tokens, minlength=4) / 4000
    expected = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(log_probs, expected.log()[tokens])


def test_draw_never_takes_what_has_no_probability():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    tokens, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 3, 3]


def test_refuses_what_cannot_be_continued(model):
    with pytest.raises(ValueError, match="empty"):
        sample(model, [[3], []], STOP, generator())
    with pytest.raises(ValueError, match="positions"):
        sample(model, [[3] * 2000], STOP, generator(), 1, 100)
