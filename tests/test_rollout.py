"""The sampler against sampling one sequence at a time, and its log-probs against the trainer's."""

import gc
import itertools
import weakref

import pytest
import torch
from conftest import small_model, with_large_biases
from torch.utils._python_dispatch import TorchDispatchMode

from lib import kernels
from lib.attention import packed_attention
from lib.packing import pack, pack_prompts, pad, response_logps
from lib.policy import make_policy
from lib.rng import torch_rng
from rollout import DecodeBatch, Rollout, Sampler, sample_tokens

STOP = [1]


def keys(prompts: list, seed: int = 0) -> list[tuple]:
    return [(seed, i) for i in range(len(prompts))]


def uniforms_of(prompts: list, group: int, T: int) -> torch.Tensor:
    return torch.cat([torch.rand(group, T, generator=torch_rng(*key)) for key in keys(prompts)])


@torch.no_grad()
def next_logits(model, row):
    batch = pack_prompts(*pad([row]))
    return model.logits(model(batch.tokens, batch.positions, packed_attention(batch, model))[-1:])


def naive(model, prompts, uniforms, group, max_new_tokens, temperature) -> Rollout:
    """Sample one sequence at a time, without cache or batch."""
    tokens = torch.zeros(len(prompts) * group, max_new_tokens, dtype=torch.long)
    log_probs = torch.zeros(tokens.shape)
    lengths, stopped = [], []
    for i in range(len(tokens)):
        row = list(prompts[i // group])
        for t in range(max_new_tokens):
            token, log_prob = sample_tokens(
                next_logits(model, row), uniforms[i, t : t + 1], temperature
            )
            tokens[i, t], log_probs[i, t] = token, log_prob
            row.append(int(token))
            if int(token) in STOP:
                break
        lengths.append(t + 1)
        stopped.append(int(token) in STOP)
    T = max(lengths)
    return Rollout(
        *pad(prompts), tokens[:, :T], torch.tensor(lengths), log_probs[:, :T], torch.tensor(stopped)
    )


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, cache_seqlens=None, return_softmax_lse=False
):
    """Do what flash-attn documents of its kernel: store k and v at cache_seqlens, then attend."""
    assert cache_seqlens.dtype == torch.int32 and return_softmax_lse
    lengths = cache_seqlens.long()
    if k is not None:
        k_cache[torch.arange(len(k)), lengths], v_cache[torch.arange(len(v)), lengths] = (
            k[:, 0],
            v[:, 0],
        )
        lengths = lengths + 1
    keys, values = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k_cache, v_cache))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * q.shape[3] ** -0.5
    later = torch.arange(keys.shape[1]) >= lengths[:, None]
    scores = scores.masked_fill(later[:, None, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)


@pytest.fixture(params=["kernel", "matmul", "flash"])
def backend(request, monkeypatch):
    """Each of the three back-ends that attend to the KV cache."""
    if request.param == "kernel":
        if not kernels.available():
            pytest.skip("needs a C compiler")
        return
    monkeypatch.setattr("lib.kernels.available", lambda: False)
    monkeypatch.setattr("lib.attention.flash_attn_with_kvcache", flash_attn_with_kvcache)
    monkeypatch.setattr("lib.attention.decode_backend", lambda model: request.param)


PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11], [3, 3, 3, 3, 3, 3, 3, 3, 3]]


@pytest.mark.parametrize(
    "backend, temperature",
    [*(("kernel", T) for T in (0.0, 0.7, 1.0, 2.0)), ("matmul", 0.7), ("flash", 1.0)],
    indirect=["backend"],
)
@pytest.mark.parametrize("group, prefix", [(1, []), (3, []), (5, [*range(12, 32)])])
def test_equals_sampling_one_sequence_at_a_time(model, backend, temperature, group, prefix):
    """With ragged prompts, rows that stop at different times, and groups that leave the batch.

    What all prompts begin with is computed once for the batch. A group of 5 has ten queries of a
    key head: in kernels.c a tile and a part of one.
    """
    prompts = [prefix + prompt for prompt in PROMPTS]
    assert pack_prompts(*pad(prompts)).shared == len(prefix)
    rollout = Sampler(model, STOP, group, 12, temperature).sample(prompts, keys(prompts))
    uniforms = uniforms_of(prompts, group, 12)
    expected = naive(model, prompts, uniforms, group, 12, temperature)
    assert torch.equal(rollout.tokens, expected.tokens)
    assert torch.equal(rollout.lengths, expected.lengths)
    assert torch.equal(rollout.stopped, expected.stopped)
    torch.testing.assert_close(rollout.logps, expected.logps, atol=1e-5, rtol=0)


def stopping_model():
    """Return a model whose rows mostly stop early, at different steps."""
    model = small_model(seed=3, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[1] += 0.25 * model.model.norm.weight
    return model


def test_groups_that_finish_leave_the_others_as_they_are(backend):
    model = stopping_model()
    prompts = [[3 + i % 5] * (1 + i % 4) for i in range(12)]
    rollout = Sampler(model, STOP, 2, 40).sample(prompts, keys(prompts))
    assert rollout.lengths.unique().numel() > 4, "the test needs rows that stop at different steps"
    uniforms = uniforms_of(prompts, 2, 40)
    expected = naive(model, prompts, uniforms, 2, 40, 1.0)
    assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(
        rollout.lengths, expected.lengths
    )


def test_the_split_over_processes_does_not_matter(model):
    """A prompt's responses depend on its own key alone."""
    whole = Sampler(model, STOP, 3, 12).sample(PROMPTS, keys(PROMPTS))
    for rank in range(2):
        mine = Sampler(model, STOP, 3, 12).sample(PROMPTS[rank::2], keys(PROMPTS)[rank::2])
        rows = [3 * i + j for i in range(rank, len(PROMPTS), 2) for j in range(3)]
        assert mine.response_tokens() == [whole.response_tokens()[row] for row in rows]


@pytest.mark.parametrize("groups", [2, 3])
def test_the_split_into_batches_does_not_matter(model, groups, monkeypatch):
    whole = Sampler(model, STOP, 3, 12).sample(PROMPTS, keys(PROMPTS))
    monkeypatch.setattr(Sampler, "max_groups", lambda self, max_prompt_len: groups)
    parts = Sampler(model, STOP, 3, 12).sample(PROMPTS, keys(PROMPTS))
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.lengths, parts.lengths)
    torch.testing.assert_close(whole.logps, parts.logps, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.0])
def test_log_probs_equal_the_trainers_at_any_temperature(model, temperature):
    rollout = Sampler(model, STOP, 4, 20, temperature).sample(PROMPTS, keys(PROMPTS))
    prompt_index = torch.arange(len(PROMPTS)).repeat_interleave(4)
    batch = pack(*pad(PROMPTS), rollout.tokens, rollout.lengths, prompt_index)
    log_probs, _ = response_logps(model, batch, temperature)
    mask = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    assert (log_probs - rollout.logps[mask]).abs().max() < 1e-4
    assert (rollout.logps[~mask] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("backend", ["kernel", "matmul"], indirect=True)
@pytest.mark.parametrize("bias", [0.0, 30.0])
def test_log_probs_in_bf16_equal_the_trainers_in_bf16(backend, bias):
    """Bug: attention scores in 16 bits, too coarse for large ones (transformers #33317)."""
    model = make_policy(with_large_biases(small_model(), bias), "bf16")
    rollout = Sampler(model, STOP, 4, 20).sample(PROMPTS, keys(PROMPTS))
    batch = pack(
        *pad(PROMPTS), rollout.tokens, rollout.lengths, torch.arange(4).repeat_interleave(4)
    )
    log_probs, _ = response_logps(model, batch)
    mask = torch.arange(rollout.tokens.shape[1]) < rollout.lengths[:, None]
    assert (log_probs - rollout.logps[mask]).abs().max() < 0.1


class Recording(TorchDispatchMode):
    """Stand in for a CUDA graph: record operations at fixed addresses, then repeat them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
        )
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def pool(self):
        return "the first's"

    def replay(self):
        for function, args, kwargs, out in self.calls:
            result = function(*args, **kwargs)
            if isinstance(out, torch.Tensor) and out.data_ptr() != result.data_ptr():
                out.copy_(result)


@pytest.mark.parametrize("backend", ["matmul", "flash"], indirect=True)
def test_steps_can_be_recorded_and_repeated(backend, monkeypatch):
    """As CUDA graphs are: for any number of updates, with new prompts and synced weights."""

    captured = []

    class Capture:
        def __init__(self, graph, pool):
            assert pool == ("the first's" if captured else None)
            self.graph = graph
            captured.append(graph)

        def __enter__(self):  # a real capture runs nothing: save the state, to restore it
            cache = sampler.batch.cache
            tensors = [*vars(sampler.batch).values(), *vars(cache).values()]
            tensors += itertools.chain(*cache.prompt_kv, *cache.response_kv)
            self.kept = [(x, x.clone()) for x in tensors if isinstance(x, torch.Tensor)]
            self.graph.__enter__()

        def __exit__(self, *error):
            self.graph.__exit__(*error)
            for x, kept in self.kept:
                x.copy_(kept)

    monkeypatch.setattr("rollout.n_threads", lambda device: 1)  # as on a GPU, one batch
    monkeypatch.setattr("torch.cuda.CUDAGraph", Recording)
    monkeypatch.setattr("torch.cuda.graph", Capture)
    model = stopping_model()
    sampler = Sampler(model, STOP, 2, 40)
    sampler.use_graphs = True
    for seed, (n, length) in enumerate(((12, 3), (12, 2), (9, 3), (12, 3))):
        prompts = [[3 + i % 5 + seed] * (1 + i % length) for i in range(n)]
        rollout = sampler.sample(prompts, keys(prompts, seed))
        expected = Sampler(model, STOP, 2, 40).sample(prompts, keys(prompts, seed))
        assert torch.equal(rollout.tokens, expected.tokens) and torch.equal(
            rollout.lengths, expected.lengths
        )
        torch.testing.assert_close(rollout.logps, expected.logps, atol=1e-5, rtol=0)
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1.02
    sizes = {P for P, _ in sampler.batch.graphs}
    assert len(sizes) > 2 and sum(g is not None for g in sampler.batch.graphs.values()) > 3


def test_a_prompt_that_leaves_no_room_for_more(model, backend):
    """Prompt and response fill the model's positions and the cache completely."""
    limit = model.config.max_position_embeddings
    prompts = [[3] * (limit - 6), [4]]
    rollout = Sampler(model, [], 2, 6).sample(prompts, keys(prompts))
    expected = naive(model, prompts, uniforms_of(prompts, 2, 6), 2, 6, 1.0)
    assert torch.equal(rollout.tokens, expected.tokens)
    torch.testing.assert_close(rollout.logps, expected.logps, atol=1e-4, rtol=0)


def test_more_prompts_than_fit_wait(model, monkeypatch):
    """Memory limits the size of a batch, and the responses do not depend on that size."""
    plenty = Sampler(model, STOP, 3, 12).sample(PROMPTS, keys(PROMPTS))
    seen, run = [], DecodeBatch.generate
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    monkeypatch.setattr(
        DecodeBatch, "generate", lambda *args: seen.append(len(args[1])) or run(*args)
    )
    scarce = Sampler(model, STOP, 3, 12).sample(PROMPTS, keys(PROMPTS))
    assert seen == [1] * len(PROMPTS)
    assert torch.equal(plenty.tokens, scarce.tokens)


def test_the_stop_token_counts_and_nothing_follows_it():
    rollout = Sampler(stopping_model(), STOP, 8, 40).sample(PROMPTS, keys(PROMPTS))
    for tokens, length, stopped in zip(rollout.tokens, rollout.lengths, rollout.stopped):
        assert (tokens[length - 1] == 1) == stopped
        assert (tokens[: length - 1] != 1).all() and (tokens[length:] == 0).all()
    assert rollout.stopped.any()


def test_all_rows_ending_at_once_and_at_the_first_token(model):
    everything = list(range(model.config.vocab_size))
    rollout = Sampler(model, everything, 2, 12).sample(PROMPTS, keys(PROMPTS))
    assert rollout.tokens.shape == (8, 1) and rollout.lengths.eq(1).all() and rollout.stopped.all()


def test_cut_off_responses_are_marked(model):
    rollout = Sampler(model, [], 2, 5).sample(PROMPTS, keys(PROMPTS))
    assert rollout.lengths.eq(5).all() and not rollout.stopped.any()


def test_greedy_responses_do_not_depend_on_the_key(model):
    a = Sampler(model, STOP, 1, 12, temperature=0.0).sample(PROMPTS, keys(PROMPTS, 0))
    b = Sampler(model, STOP, 1, 12, temperature=0.0).sample(PROMPTS, keys(PROMPTS, 1))
    assert torch.equal(a.tokens, b.tokens)


def test_sample_tokens_follows_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    uniforms = (torch.arange(4000) + 0.5) / 4000
    tokens, log_probs = sample_tokens(logits.expand(4000, 4), uniforms, temperature=0.5)
    shares = torch.bincount(tokens, minlength=4) / 4000
    expected = (logits[0] / 0.5).softmax(-1)
    torch.testing.assert_close(shares, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(log_probs, expected.log()[tokens])


def test_sample_tokens_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).expand(3, 5)
    tokens, _ = sample_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), 1.0)
    assert tokens.tolist() == [1, 3, 3]


def test_refuses_what_cannot_be_continued(model):
    with pytest.raises(ValueError, match="empty"):
        Sampler(model, STOP).sample([[3], []], keys([[3], []]))
    with pytest.raises(ValueError, match="positions"):
        Sampler(model, STOP, 1, 100).sample([[3] * 2000], keys([[3]]))


def test_a_batch_is_freed_at_once(model, monkeypatch):
    """Its cache is large, so freeing it must not wait for the garbage collector."""
    seen, run = [], DecodeBatch.generate

    def watched(self, *args):
        seen.append(weakref.ref(self))
        return run(self, *args)

    monkeypatch.setattr(DecodeBatch, "generate", watched)
    gc.disable()
    try:
        Sampler(model, STOP, 2, 5).sample(PROMPTS, keys(PROMPTS))
        assert seen and not any(ref() for ref in seen)
    finally:
        gc.enable()


@pytest.mark.parametrize("V", [5, 700])
def test_logits_that_are_not_finite_do_not_stop_the_sampler(V):
    """On a GPU a token beyond the vocabulary would end the process; here the loss becomes NaN."""
    logits = torch.zeros(3, V)
    logits[0], logits[1, 2] = torch.nan, torch.inf
    for temperature in (0.0, 1.0):
        tokens, log_probs = sample_tokens(logits, torch.full((3,), 0.5), temperature)
        assert (
            (tokens >= 0).all()
            and (tokens < V).all()
            and log_probs.isfinite().tolist() == [False, False, True]
        )


def test_greedy_log_probs_are_those_at_temperature_1():
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    tokens, logps = sample_tokens(logits, torch.rand(2), 0.0)
    assert tokens.tolist() == [1, 0]
    torch.testing.assert_close(logps, logits.log_softmax(-1).max(-1).values)
