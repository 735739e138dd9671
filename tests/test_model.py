"""The transformer against transformers' Qwen2ForCausalLM, and packing against one sequence at a time."""

import pytest
import torch
from conftest import small_model
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from checkpoint import hf_config, load_model, save_checkpoint
from model import (
    ModelConfig,
    Transformer,
    flash_attention,
    init_weights,
    pack,
    packed_attention,
    pad,
    padded_attention,
    response_log_probs,
)
from rollout import Cache

SHAPES = {
    "grouped keys": {"num_key_value_heads": 2},
    "one key head": {"num_key_value_heads": 1},
    "a key head each": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "theta 1e4": {"rope_theta": 1e4},
}


def twin(model, tokenizer) -> Qwen2ForCausalLM:
    """transformers' model with the same weights."""
    reference = Qwen2ForCausalLM(Qwen2Config(**hf_config(model.config, tokenizer))).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not missing and not unexpected
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
    prompts, lengths = pad(rows)
    none = lengths[:0]
    batch = pack(prompts, lengths, none[:, None], none, none)
    ours = model.logits(model(batch.tokens, batch.positions, packed_attention(batch))).split(lengths.tolist())
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
    cache = Cache(model, prompts, (2, 6), torch.device("cpu"))
    steps = [model.logits(cache.prefill(model)).repeat_interleave(2, 0)]
    for t in range(5):
        steps.append(model.logits(cache.step(model, torch.tensor([r[t] for r in responses]), t)))
        if t == 2:  # the second group leaves
            cache.keep(torch.tensor([True, False, True]))
            responses = [r for i, r in enumerate(responses) if i not in (2, 3)]
            prompts = [prompts[0], prompts[2]]
            steps = [s[[0, 1, 4, 5]] for s in steps]
    for i, response in enumerate(responses):
        prompt = prompts[i // 2]
        expected = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack([s[i] for s in steps]), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_saved_checkpoint_loads_in_transformers_and_here(tmp_path, model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters())
    folder = save_checkpoint(tmp_path, 3, model, tokenizer, optimizer, {})
    reference = AutoModelForCausalLM.from_pretrained(folder).eval()
    again, tokenizer_again = load_model(folder)
    assert tokenizer_again.get_vocab() == tokenizer.get_vocab()
    tokens = torch.tensor([random_rows(model.config.vocab_size, [11])[0]])
    expected = twin(model, tokenizer)(tokens).logits
    torch.testing.assert_close(reference(tokens).logits, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(twin(again, tokenizer)(tokens).logits, expected, atol=0, rtol=0)
    assert reference.generation_config.eos_token_id == [tokenizer.eos_token_id]


def one_by_one(model, reference, prompts, responses, parents, temperature):
    """Log-probs of the responses from whole sequences, by transformers."""
    values = []
    for response, parent in zip(responses, parents):
        prompt = prompts[parent]
        logits = reference(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
        values.append(logits.log_softmax(-1)[range(len(response)), response])
    return torch.cat(values)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_response_log_probs_equal_transformers(model, tokenizer, temperature):
    """Ragged prompts shared by groups of any size, a response of one token among them; and their gradients."""
    reference = twin(model, tokenizer)
    prompts = random_rows(model.config.vocab_size, [4, 9, 1])
    responses = random_rows(model.config.vocab_size, [5, 1, 8, 2, 3], seed=2)
    parents = [0, 0, 2, 1, 2]
    batch = pack(*pad(prompts), *pad(responses), torch.tensor(parents))
    log_probs, entropy = response_log_probs(model, batch, temperature, chunk=4)
    expected = one_by_one(model, reference, prompts, responses, parents, temperature)
    torch.testing.assert_close(log_probs, expected, atol=2e-5, rtol=0)
    assert entropy.shape == log_probs.shape and not entropy.requires_grad

    weights = torch.linspace(-1, 1, len(expected))
    (log_probs * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(reference.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, theirs[name].grad, atol=1e-5, rtol=1e-4)


def test_chunks_leave_log_probs_and_gradient_as_they_are(model):
    batch = pack(*pad([[3, 4, 5]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 0]))
    results = []
    for chunk in (1, 3, 100):
        model.zero_grad()
        log_probs, entropy = response_log_probs(model, batch, chunk=chunk)
        log_probs.sum().backward()
        results.append((log_probs.detach(), entropy, model.lm_head.weight.grad.clone()))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_flash_attention_is_given_the_right_segments(model, monkeypatch):
    """The kernel needs a GPU; here stands what its documentation says of it, a segment at a time, in bf16."""

    def kernel(q, k, v, starts_q, starts_k, longest_q, longest_k, causal):
        assert causal and starts_q.dtype == starts_k.dtype == torch.int32 and q.dtype == torch.bfloat16
        out = torch.zeros_like(q)
        assert starts_q[-1] == len(q) and starts_k[-1] == len(k) == len(v)
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
            assert b - a <= longest_q and d - c <= longest_k
            mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))  # aligned to the end
            heads = (x.transpose(0, 1)[None].float() for x in (q[a:b], k[c:d], v[c:d]))
            one = torch.nn.functional.scaled_dot_product_attention(*heads, mask, enable_gqa=True)
            out[a:b] = one[0].transpose(0, 1).bfloat16()
        return out

    monkeypatch.setattr("model.flash_attn_varlen_func", kernel)
    prompts = random_rows(model.config.vocab_size, [4, 9, 1])
    responses = random_rows(model.config.vocab_size, [5, 1, 8, 2, 3], seed=2)
    batch = pack(*pad(prompts), *pad(responses), torch.tensor([0, 0, 2, 1, 2]))
    with torch.no_grad():
        padded, flash = (model(batch.tokens, batch.positions, f(batch)) for f in (padded_attention, flash_attention))
    assert 0 < (padded - flash).abs().max() < 0.05 * padded.abs().max()


def test_positions_are_consecutive_unless_given(model):
    prompts, responses = pad([[3, 4], [5]]), pad([[6, 1], [7, 8]])
    parents = torch.arange(2)
    assert pack(*prompts, *responses, parents).positions.tolist() == [0, 1, 0, 2, 1]
    given = torch.tensor([[0, 3], [2, 9]]), torch.tensor([[7, 9], [4, 9]])
    assert pack(*prompts, *responses, parents, given).positions.tolist() == [0, 3, 2, 7, 4]


@torch.no_grad()
def test_the_new_model_is_born_with_previous_token_heads():
    """In the first layer each head looks its own number of tokens back, wherever it stands."""
    model = Transformer(ModelConfig(vocab_size=100))
    init_weights(model, torch.Generator().manual_seed(0))
    tokens = torch.randint(3, 100, (40,), generator=torch.Generator().manual_seed(1))
    seen = {}

    def attend(layer, q, k, v):
        seen.setdefault(layer, (q, k))
        return torch.zeros_like(q)

    model(tokens, torch.arange(40), attend)
    q, k = seen[0]
    scores = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(2, 1))
    for head, back in enumerate((1, 2, 3, 5)):
        for i in (10, 25, 39):
            assert scores[head, i, : i + 1].argmax() == i - back
