"""All families against transformers, and packed batches against one sequence at a time."""

from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from conftest import small_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lib.attention import packed_attention, padded_attention, torch_varlen, varlen_attention
from lib.checkpoint import hf_config, load_model
from lib.packing import MAX_LOGITS, pack, pack_prompts, pad, response_logps
from lib.policy import make_policy, sync_weights
from lib.run_dir import save_checkpoint
from lib.transformer import (
    ModelConfig,
    RopeScaling,
    Transformer,
    hf_weights,
    init_weights,
    split_heads,
)
from rollout import DecodeBatch, Sampler

SHAPES = {
    "grouped keys": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "theta 1e4": {"rope_theta": 1e4},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "llama": {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama 3.1": {
        "model_type": "llama",
        "rope_theta": 1e3,
        "rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32),
    },
}


def twin(model, tokenizer) -> PreTrainedModel:
    """transformers' model with the same weights."""
    config = AutoConfig.for_model(**hf_config(model.config, tokenizer))
    reference = AutoModelForCausalLM.from_config(config).float().eval()
    missing, unexpected = reference.load_state_dict(dict(hf_weights(model)), strict=False)
    assert (
        set(missing) <= ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
        and not unexpected
    )
    return reference


def random_rows(vocabulary: int, lengths: list[int], seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_equal_those_of_transformers(shape, tokenizer):
    model = small_model(**shape)
    reference = twin(model, tokenizer)
    rows = random_rows(model.config.vocab_size, [1, 7, 19, 12])
    batch = pack_prompts(*pad(rows))
    ours = model.logits(model(batch.tokens, batch.positions, packed_attention(batch, model)))
    ours = ours.split(batch.lengths.tolist())
    for row, logits in zip(rows, ours):
        expected = reference(torch.tensor([row])).logits[0]
        assert expected.std() > 0.1
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prefill_and_decode_equal_transformers(shape, tokenizer):
    """Ragged prompts in groups of two, decoded with the cache, against whole sequences."""
    model = small_model(**shape)
    reference = twin(model, tokenizer)
    prompts = random_rows(model.config.vocab_size, [5, 1, 9])
    responses = random_rows(model.config.vocab_size, [6] * 6, seed=2)
    batch = DecodeBatch(Sampler(model, [-1], 2, 6), 3, 9)
    batch.P, seen = 3, []
    batch.write_token = lambda hidden: seen.append(model.logits(hidden))
    batch.write_token(batch.prefill(*pad(prompts)).repeat_interleave(2, 0))
    for t in range(5):
        batch.last_tokens[: len(responses)] = torch.tensor([r[t] for r in responses])
        batch.cache.t.fill_(t)
        batch.decode_step(t)
        if t == 2:  # the second group leaves
            batch.out_tokens[2:4, 1] = -1
            assert batch.drop_finished(t) and batch.P == 2
            responses = [r for i, r in enumerate(responses) if i not in (2, 3)]
            prompts = [prompts[0], prompts[2]]
            seen = [s[[0, 1, 4, 5]] for s in seen]
    for i, response in enumerate(responses):
        prompt = prompts[i // 2]
        expected = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([s[i] for s in seen]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_saved_checkpoint_loads_in_transformers_and_here(shape, tmp_path, tokenizer):
    model = small_model(**shape)
    optimizer = torch.optim.AdamW(model.parameters())
    folder = save_checkpoint(tmp_path, 3, model, tokenizer, optimizer, {}).result()
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    again, tokenizer_again = load_model(folder)
    assert again.config == model.config
    assert tokenizer_again.inner.get_vocab() == tokenizer.inner.get_vocab()
    tokens = torch.tensor([random_rows(model.config.vocab_size, [11])[0]])
    expected = twin(model, tokenizer)(tokens).logits
    torch.testing.assert_close(reference(tokens).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(twin(again, tokenizer)(tokens).logits, expected, atol=0, rtol=0)
    assert reference.generation_config.eos_token_id == tokenizer.stops


def one_by_one(model, reference, prompts, responses, prompt_index, temperature):
    """Log-probs of the responses from whole sequences, by transformers."""
    values = []
    for response, i in zip(responses, prompt_index):
        prompt = prompts[i]
        logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        logits = logits / temperature
        values.append(logits.log_softmax(-1)[range(len(response)), response])
    return torch.cat(values)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("temperature, shared", [(0.7, 0), (1.0, 0), (0.7, 20)])
def test_response_log_probs_equal_transformers(shape, tokenizer, temperature, shared, monkeypatch):
    """Ragged prompts, groups of any size, a response of one token; and their gradients."""
    model = small_model(**shape)
    reference = twin(model, tokenizer)
    (prefix,) = random_rows(model.config.vocab_size, [shared], seed=3)
    prompts = [prefix + rest for rest in random_rows(model.config.vocab_size, [4, 9, 1])]
    responses = random_rows(model.config.vocab_size, [5, 1, 8, 2, 3], seed=2)
    prompt_index = [0, 0, 2, 1, 2]
    batch = pack(*pad(prompts), *pad(responses), torch.tensor(prompt_index))
    assert batch.shared == shared and len(batch.tokens) == shared + 14 + 14
    chunk = 4 * model.config.vocab_size
    monkeypatch.setitem(MAX_LOGITS, "cpu", chunk)
    log_probs, entropy = response_logps(model, batch, temperature, entropy=True)
    expected = one_by_one(model, reference, prompts, responses, prompt_index, temperature)
    torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=0)
    assert entropy.shape == log_probs.shape and not entropy.requires_grad

    weights = torch.linspace(-1, 1, len(expected))
    (log_probs * weights).sum().backward()
    (expected * weights).sum().backward()
    gradient = deepcopy(model)
    for weight, of in zip(gradient.parameters(), model.parameters()):
        weight.data = of.grad
    theirs = {name: weight.grad for name, weight in reference.named_parameters()}
    for name, weight in hf_weights(gradient):
        bound = min(2e-5, 3e-5 * float(theirs[name].abs().max()))  # sizes differ by weight
        torch.testing.assert_close(weight, theirs[name], atol=bound, rtol=1e-4)


def test_chunks_leave_log_probs_and_gradient_as_they_are(model, monkeypatch):
    batch = pack(*pad([[3, 4, 5]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 0]))
    results = []
    for chunk in (1, 3, 100):
        model.zero_grad()
        monkeypatch.setitem(MAX_LOGITS, "cpu", chunk * model.config.vocab_size)
        log_probs, entropy = response_logps(model, batch, entropy=True)
        log_probs.sum().backward()
        results.append((log_probs.detach(), entropy, model.lm_head.weight.grad.clone()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision, bound", [("fp32", 1e-5), ("bf16", 0.02)])
@pytest.mark.parametrize("compiler", [True, False])
def test_a_frozen_heads_gradient_is_that_of_a_trained_one(precision, bound, compiler, monkeypatch):
    """It is worked out in the forward pass, in several chunks, and waits for the loss's factors."""
    if not compiler:
        monkeypatch.setattr("lib.kernels.available", lambda: False)
    batch = pack(*pad([[3, 4, 5]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 0]))
    results = []
    for trained in (False, True):
        model = make_policy(small_model(tie_word_embeddings=False), precision)
        model.lm_head.weight.requires_grad_(trained)
        monkeypatch.setitem(MAX_LOGITS, "cpu", 3 * model.config.vocab_size)
        logps, entropies = response_logps(model, batch, 0.7, entropy=True)
        assert not entropies.requires_grad
        (logps * torch.linspace(-1, 2, len(logps))).sum().backward()
        gradients = [w.grad.flatten() for w in model.model.parameters()]
        results.append((logps.detach(), entropies, torch.cat([g.float() for g in gradients])))
    for ours, expected in zip(*results):
        assert (ours - expected).norm() <= bound * expected.norm() and expected.norm() > 0


def test_logits_are_never_all_there(monkeypatch):
    """Bug: logits kept for the backward pass (trl #3678). Memory ignores the vocabulary."""
    kept, largest = {}, {}

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[size] = max(largest.get(size, 0), out.numel())
            return out

    def keep(x):
        is_weight = x.shape == (size, 32)  # weights do not count
        kept[size] = kept.get(size, 0) + x.numel() * (not is_weight)
        return x

    batch = pack(*pad([[3, 4, 5]] * 4), *pad([[6] * 50] * 16), torch.arange(16) % 4)
    for size in (100, 10_000):
        model = Transformer(ModelConfig(size, 32, 48, 1))
        monkeypatch.setitem(MAX_LOGITS, "cpu", 20 * size)
        with Largest():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                log_probs, _ = response_logps(model, batch, entropy=True)
            log_probs.sum().backward()
    assert kept[100] == kept[10_000] > 0
    assert largest[10_000] <= 32 * 10_000, (
        "no tensor is larger than the embedding or a chunk, 20 x vocabulary"
    )


def test_recomputed_activations_leave_the_gradient_as_it_is(model):
    batch = pack(*pad([[3, 4, 5], [4]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 1]))
    gradients = []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        response_logps(model, batch)[0].sum().backward()
        gradients.append([w.grad.clone() for w in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


def test_the_policy_in_bf16(model):
    """It follows the fp32 weights when synced, its log-probs to the precision of bf16."""
    policy = make_policy(model, "bf16")
    assert policy.dtype == torch.bfloat16 and model.dtype == torch.float32
    assert (
        policy.lm_head.weight is policy.model.embed_tokens.weight
        and policy.model.norm.weight.dtype == torch.float32
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    sync_weights(policy, model)
    batch = pack(*pad([[3, 4, 5], [4]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 1]))
    exact, rounded = (response_logps(m, batch)[0] for m in (model, policy))
    assert 0 < (exact - rounded).abs().max() < 0.1
    assert make_policy(model, "fp32") is model


@pytest.mark.parametrize("which, shared", [("flash-attn's", 20), ("PyTorch's", 0)])
def test_varlen_kernels_are_given_the_right_segments(model, monkeypatch, which, shared):
    """The kernels need a GPU; a stand-in does what their documentation says, segment by segment."""

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        assert options == ({"causal": True} if which == "flash-attn's" else torchs_options)
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        out = torch.zeros_like(q)
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
        for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
            assert b - a <= max_seqlen_q and d - c <= max_seqlen_k
            mask = torch.ones(b - a, d - c, dtype=torch.bool)
            mask = mask.tril(int((d - c) - (b - a)))  # aligned to the end
            heads = (x.transpose(0, 1)[None].float() for x in (q[a:b], k[c:d], v[c:d]))
            one = torch.nn.functional.scaled_dot_product_attention(*heads, mask, enable_gqa=True)
            out[a:b] = one[0].transpose(0, 1)
        return out

    torchs_options = torch_varlen()[1]
    assert torchs_options.items() & {("window_size", (-1, 0)), ("is_causal", True)}, (
        "one or the other, by the release that is installed"
    )
    monkeypatch.setattr(
        "lib.attention.flash_attn_varlen_func", kernel if which == "flash-attn's" else None
    )
    monkeypatch.setattr("lib.attention.torch_varlen", lambda: (kernel, torchs_options))
    (prefix,) = random_rows(model.config.vocab_size, [shared], seed=3)
    prompts = [prefix + rest for rest in random_rows(model.config.vocab_size, [4, 9, 1])]
    responses = random_rows(model.config.vocab_size, [5, 1, 8, 2, 3], seed=2)
    batch = pack(*pad(prompts), *pad(responses), torch.tensor([0, 0, 2, 1, 2]))
    assert batch.shared == shared
    with torch.no_grad():
        attends = (f(batch, model.config) for f in (padded_attention, varlen_attention))
        padded, varlen = (model(batch.tokens, batch.positions, attend) for attend in attends)
    torch.testing.assert_close(padded, varlen, atol=1e-5, rtol=0)


def test_positions_are_consecutive_unless_given(model):
    prompts, responses = pad([[3, 4], [5]]), pad([[6, 1], [7, 8]])
    prompt_index = torch.arange(2)
    assert pack(*prompts, *responses, prompt_index).positions.tolist() == [0, 1, 0, 2, 1]
    given = torch.tensor([[0, 3], [2, 9]]), torch.tensor([[7, 9], [4, 9]])
    assert pack(*prompts, *responses, prompt_index, given).positions.tolist() == [0, 3, 2, 7, 4]


@torch.no_grad()
def test_a_new_model_has_previous_token_heads():
    """In the first layer each head attends a fixed number of tokens back, at any position."""
    model = Transformer(ModelConfig(vocab_size=100))
    init_weights(model, torch.Generator().manual_seed(0))
    tokens = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(1))
    seen = {}

    def attend(layer, qkv, rope):
        seen.setdefault(layer, split_heads(qkv, rope, model.config))
        return torch.zeros_like(seen[layer][0]).flatten(1)

    model(tokens, torch.arange(40), attend)
    q, k, _ = seen[0]
    attention_scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1))
    for head, back in enumerate((1, 2, 3, 5)):
        for i in (10, 25, 39):
            assert attention_scores[head, i, : i + 1].argmax() == i - back


def test_rows_that_fill_up_a_batch_in_bf16_change_nothing(monkeypatch):
    """oneDNN keeps memory for each number of rows that it meets, so there are few numbers."""
    model, numbers = make_policy(small_model(), "bf16"), set()
    generator, real = torch.Generator().manual_seed(0), F.linear

    def linear(x, *args):
        numbers.add(len(x))
        return real(x, *args)

    for n in (21, 100, 257, 300, 400):
        rows = torch.randint(3, 60, (2, n), generator=generator)
        lengths, index = (torch.tensor([5]), torch.tensor([n])), torch.tensor([0])
        batch = pack(rows[:1, :5], lengths[0], rows[1:], lengths[1], index)
        with monkeypatch.context() as patch:
            patch.setattr(F, "linear", linear)
            logps, _ = response_logps(model, batch)
            gradients = torch.autograd.grad(logps.sum(), list(model.parameters()))
        with monkeypatch.context() as patch:
            patch.setattr(Transformer, "extra_rows", lambda *_: 0)
            plain, _ = response_logps(model, batch)
            expected = torch.autograd.grad(plain.sum(), list(model.parameters()))
        torch.testing.assert_close(logps, plain, atol=0.05, rtol=0.02)
        for a, b in zip(gradients, expected):
            assert (a - b).float().norm() <= 0.03 * b.float().norm()
    # of the body (n + 4 tokens read), and of the head (n tokens predicted)
    assert numbers == {32, 24, 104, 320, 448}


def test_fp32_adds_no_rows():
    assert small_model().extra_rows(300) == 0
    policy = make_policy(small_model(), "bf16")
    assert [policy.extra_rows(n) for n in (8, 9, 255, 256, 257, 300)] == [0, 7, 1, 0, 63, 20]


@pytest.mark.parametrize("compiler", [True, False])
def test_entropies_are_those_of_the_distributions(model, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr("lib.kernels.available", lambda: False)
    batch = pack(*pad([[3, 4, 5], [4]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 1]))
    _, entropies = response_logps(model, batch, 0.7, entropy=True)
    hidden = model(batch.tokens, batch.positions, packed_attention(batch, model))
    logits = model.logits(hidden[batch.logit_indices]) / 0.7
    torch.testing.assert_close(entropies, torch.distributions.Categorical(logits=logits).entropy())


@torch.no_grad()
def test_a_prompt_may_begin_another(model):
    """What they share then ends before its last token, which predicts the response."""
    (long,) = random_rows(model.config.vocab_size, [24])
    prompts, responses = [long, long[:20]], [[6, 7, 1], [8, 1]]
    batch = pack(*pad(prompts), *pad(responses), torch.tensor([0, 1]))
    assert batch.shared == 19
    pairs = zip(prompts, responses)
    alone = [pack(*pad([p]), *pad([r]), torch.tensor([0])) for p, r in pairs]
    expected = torch.cat([response_logps(model, one)[0] for one in alone])
    torch.testing.assert_close(response_logps(model, batch)[0], expected, atol=1e-5, rtol=0)
