"""Adapters: what they compute, that the base stays as it is, and that PEFT agrees."""

import copy
import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import backward, make_pretrained, same_weights, small_model
from transformers import AutoModelForCausalLM

import train_grpo
import train_sft
from data.finite_field import Problem
from lib import kernels
from lib.checkpoint import find_checkpoint, load_master, load_model
from lib.distributed import World
from lib.lora import (
    Adapter,
    AddProduct,
    adapted,
    add_adapters,
    add_lora,
    dropout_key,
    load_adapters,
    mark_stale,
    packed_adapters,
    peft_weights,
    without_adapters,
)
from lib.packing import pack, pad, response_logps
from lib.policy import DTYPES, cast_matmuls, make_policy, sync_weights, trainable_parameters
from lib.run_dir import describe_start, read_log, save_checkpoint
from lib.tokenizer import load_tokenizer
from lib.training import accumulate_gradients
from lib.transformer import Linear, hf_weights
from rollout import Sampler

ONE = World(0, 1, torch.device("cpu"))
BATCH = pack(*pad([[3, 4, 5], [4]]), *pad([[6, 7, 8, 9, 1], [7, 1]]), torch.tensor([0, 1]))


def adapters_on(base, rank: int = 3, dropout: float = 0.0):
    """Adapters that change something: B is not zero."""
    policy = add_lora(base, rank, 2 * rank, dropout, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for linear in adapted(policy).values():
            linear.adapter.b.normal_(0, 0.1, generator=generator)
    return policy


def lora_from(start, run) -> dict:
    """What training.json says of `adapters_on` a model in the folder `start`."""
    return {"lora": 3, "lora_alpha": 6, "lora_dropout": 0.0} | describe_start(start, "", run)


def log_probs(model, **options):
    return response_logps(model, BATCH, **options)[0]


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_adapters_add_what_they_say(family):
    """New adapters add nothing; trained ones equal changed weights; the base never changes."""
    base = small_model(model_type=family)
    before = log_probs(base).detach()
    fresh = add_lora(base, 4, 8, 0.05, torch.Generator().manual_seed(0))
    assert torch.equal(log_probs(fresh).detach(), before)
    policy = adapters_on(base)
    merged = copy.deepcopy(base)
    adapters = peft_weights(policy)
    assert len(adapters) == 2 * 7 * 2, "A and B of all matrices of the blocks"
    for name, weight in hf_weights(merged):
        weight.copy_(add_adapters(name, weight, adapters, scale=2.0))
    after = log_probs(policy).detach()
    assert (after - before).abs().max() > 0.01
    torch.testing.assert_close(after, log_probs(merged).detach(), atol=1e-5, rtol=0)
    assert torch.equal(log_probs(base).detach(), before), "the base is the reference"
    again = without_adapters(policy)
    assert torch.equal(log_probs(again).detach(), before) and adapted(policy) and not adapted(again)
    assert again.lm_head.weight is policy.lm_head.weight, "the head is shared, not copied"


def test_only_adapters_are_trained_and_frozen_weights_are_shared():
    base = small_model()
    policy = adapters_on(base)
    names = [name for name, w in policy.named_parameters() if w.requires_grad]
    assert names and all(".adapter." in name for name in names)
    assert not trainable_parameters(base)
    lowered = adapters_on(make_policy(small_model(), "bf16"))
    compute = make_policy(lowered, "bf16")
    for (name, w), (_, c) in zip(
        lowered.named_parameters(), compute.named_parameters(), strict=True
    ):
        if ".adapter." in name:
            assert w.dtype == torch.float32 and c.dtype == torch.bfloat16
        else:
            assert w is c, "frozen weights are shared, not copied"
    with torch.no_grad():
        for w in trainable_parameters(lowered):
            w.add_(0.1)
    sync_weights(compute, lowered)
    torch.testing.assert_close(
        trainable_parameters(compute)[0].float(),
        trainable_parameters(lowered)[0],
        atol=0.01,
        rtol=0.01,
    )


def test_dropout_depends_on_its_key_alone():
    policy = adapters_on(small_model(), dropout=0.5)
    undropped = log_probs(adapters_on(small_model()))
    assert torch.equal(log_probs(policy), undropped), "without a key nothing is dropped"
    assert torch.equal(log_probs(policy, dropout_key=1), log_probs(policy, dropout_key=1))
    assert not torch.equal(log_probs(policy, dropout_key=1), log_probs(policy, dropout_key=2))

    linear = next(iter(adapted(policy).values()))
    x = torch.ones(2000, linear.in_features)
    zeros = torch.zeros(2000, linear.out_features)
    exact, dropped = (linear.adapter(x, zeros.clone(), key).mean(0) for key in (None, 7))
    torch.testing.assert_close(exact, dropped, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("factor", [1.0, 1 / 0.7])
def test_the_gradient_of_an_adapters_product(factor):
    """Three stacked matrices of different sizes, in place on a tensor that needs its gradient."""
    linear = Linear(5, 4, 2, 3)
    adapter = Adapter(linear, rank=2, alpha=6, dropout=0.0, number=0).double()
    torch.nn.init.normal_(adapter.a)
    x, before, b = (torch.randn(shape).double() for shape in ((7, 5), (7, 9), (9, 2)))

    def product(before, x, a, b):
        adapter.b.data, adapter.stale, adapter.block = b.detach(), True, None
        return AddProduct.apply(before.clone(), x, a, b, adapter.scaled_block(), factor, adapter)

    tensors = [t.detach().requires_grad_() for t in (before, x, adapter.a, b)]
    assert torch.autograd.gradcheck(product, tensors)
    parts = zip(adapter.a.chunk(3), b.split((4, 2, 3)))
    expected = before + torch.cat([factor * 3 * x @ a.t() @ of.t() for a, of in parts], -1)
    torch.testing.assert_close(product(before, x, adapter.a, b), expected)


@pytest.mark.usefixtures("two_threads")
def test_threads_share_an_adapters_cached_product():
    """Bug: of two threads that met a stale block both made it, and broke the other's backward."""
    policy = adapters_on(small_model())
    expected = torch.autograd.grad(log_probs(policy).sum(), trainable_parameters(policy))
    at_once = threading.Barrier(2)

    def loss_fn(i, batch):
        at_once.wait()
        return response_logps(policy, batch)[0].sum(), {}

    for _ in range(40):
        mark_stale(policy)
        accumulate_gradients(policy, policy, loss_fn, [BATCH, BATCH], ONE)
    for weight, of_one in zip(trainable_parameters(policy), expected, strict=True):
        torch.testing.assert_close(weight.grad / 80, of_one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_follow_every_step(precision):
    """They are multiplied as block-diagonal matrices, made anew in place: graphs keep addresses."""
    master = adapters_on(cast_matmuls(small_model(), DTYPES[precision]))
    policy = make_policy(master, precision)
    optimizer = torch.optim.AdamW(trainable_parameters(master), lr=0.1, fused=True)
    addresses = set()
    for _ in range(3):
        anew = copy.deepcopy(policy)
        mark_stale(anew)
        trained = log_probs(policy)
        assert torch.equal(log_probs(anew), trained)
        addresses.add(tuple(m.adapter.block.data_ptr() for m in adapted(policy).values()))
        gradients = torch.autograd.grad(trained.sum(), trainable_parameters(policy))
        for weight, gradient in zip(trainable_parameters(master), gradients):
            weight.grad = gradient.float()
        optimizer.step()
        sync_weights(policy, master)
    assert len(addresses) == 1
    moved = (log_probs(policy) - trained).abs().max()
    assert moved > 1, "the test needs steps that show"


@pytest.mark.skipif(not kernels.PACKS, reason="needs oneDNN")
def test_sampling_on_the_cpu_multiplies_matrix_and_adapter_at_once():
    """In bf16 without gradients: the same to rounding, made anew after a step, and in copies."""
    torch.manual_seed(0)
    linear = Linear(24, 16, 8, 40, bias=True).bfloat16().requires_grad_(False)
    torch.nn.init.normal_(linear.bias, std=20)
    linear.adapter = Adapter(linear, rank=4, alpha=8, dropout=0.0, number=0).bfloat16()
    a, b = linear.adapter.parameters()
    x = torch.randn(50, 24).bfloat16()
    for trained in ((a, b), (a,), (b,)):
        for weight in trained:
            torch.nn.init.normal_(weight)
        linear.adapter.stale = True
        pairs = linear.adapter.pairs()
        whole = linear.weight.float() + 2 * torch.cat([b.float() @ a.float() for a, b in pairs])
        expected = x.float() @ whole.t() + linear.bias.float()
        with torch.no_grad():
            at_once = linear(x, None)
            assert torch.equal(copy.deepcopy(linear)(x, None), at_once)
        assert linear.adapter in packed_adapters
        one_by_one = linear(x, None)
        assert linear.adapter not in packed_adapters, "training frees what sampling has packed"
        for found in (at_once, one_by_one):
            assert (found - expected).abs().max() < 0.01 * expected.abs().max()
        assert not torch.equal(at_once, one_by_one)


def test_dropout_is_the_same_when_activations_are_computed_again():
    policy = adapters_on(small_model(), dropout=0.3)
    gradients = []
    for policy.gradient_checkpointing in (False, True):
        loss = log_probs(policy, dropout_key=5).sum()
        gradients.append(torch.autograd.grad(loss, trainable_parameters(policy)))
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_peft_loads_what_is_saved(family, tmp_path):
    """PEFT's adapters on the base, and the merged model in transformers: same logits, gradients."""
    peft = pytest.importorskip("peft")
    start = make_pretrained(tmp_path / "start", family)
    base, tokenizer = load_model(start)
    policy = adapters_on(base)
    optimizer = torch.optim.AdamW(trainable_parameters(policy))
    folder = save_checkpoint(
        tmp_path, 1, policy, tokenizer, optimizer, lora_from(start, tmp_path) | {"total": 1}
    ).result()
    theirs = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(start), folder / "adapter", is_trainable=True
    ).eval()
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt, response = [3, 4, 5, 200], [6, 7, 8, 9, 1]
    tokens = torch.tensor([prompt + response])
    batch = pack(*pad([prompt]), *pad([response]), torch.tensor([0]))
    ours = response_logps(policy, batch)[0]
    for model in (theirs, merged):
        expected = model(tokens).logits[0, 3:-1].log_softmax(-1)[range(5), response]
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=0)
        if model is theirs:
            expected.sum().backward()
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, atol=1e-5, rtol=0)

    gradients = torch.autograd.grad(ours.sum(), trainable_parameters(policy))
    found = {name: w.grad for name, w in theirs.named_parameters() if w.grad is not None}
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
    torch.testing.assert_close(gradients[0][:3], found[first.format("A")], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(gradients[1][:48], found[first.format("B")], atol=1e-4, rtol=1e-3)


def test_adapters_are_loaded_as_they_were_saved(tmp_path, pretrained):
    base, tokenizer = load_model(pretrained)
    policy = adapters_on(base)
    optimizer = torch.optim.AdamW(trainable_parameters(policy))
    meta = lora_from(pretrained, tmp_path)
    folder = save_checkpoint(tmp_path, 1, policy, tokenizer, optimizer, meta).result()
    again = add_lora(base, 3, 6, 0.0, torch.Generator())
    before = log_probs(again)
    load_adapters(again, folder / "adapter")
    assert same_weights(again, policy)
    loaded = log_probs(again)
    assert torch.equal(loaded, log_probs(policy)) and not torch.equal(loaded, before)


def test_each_adapter_drops_other_inputs():
    """Though their inputs have one size and their key is one."""
    policy = adapters_on(small_model(), dropout=0.5)
    linears = [m for m in adapted(policy).values() if m.in_features == 32]
    x, masks = torch.ones(50, 32, requires_grad=True), set()
    for linear in linears:
        out = linear.adapter(x, torch.zeros(50, linear.out_features), 7)
        (slopes,) = torch.autograd.grad(out.sum(), x)
        masks.add(tuple((slopes == 0).flatten().tolist()))
    assert len(masks) == len(linears) > 1


def test_dropout_has_a_stream_for_each_seed_update_process_and_micro_batch():
    config = train_grpo.GrpoConfig(lora=3, lora_dropout=0.1)
    places = [(3, 1, 2), (4, 1, 2), (3, 0, 2), (3, 1, 0)]
    found = {dropout_key(config, *place) for place in places}
    found.add(dropout_key(replace(config, seed=1), *places[0]))
    assert len(found) == 5
    for off in ({"lora": 0}, {"lora_dropout": 0.0}):
        assert dropout_key(replace(config, **off), *places[0]) is None


def test_adapters_begin_as_the_seed_says(pretrained):
    flags = {"lora": 3, "lora_dropout": 0.0, "temperature": 1.0}
    first, same, other = (
        load_master(train_grpo.GrpoConfig(seed=seed, **flags), pretrained, None, "fp32", "cpu")
        for seed in (1, 1, 2)
    )
    assert same_weights(first, same)
    for a, b in zip(*(adapted(model).values() for model in (first, other))):
        assert not torch.equal(a.adapter.a, b.adapter.a)


# ------------------------------------------------------------------------------------------------
# The whole pipeline with a pretrained model

SFT = {
    "keep": 0,
    "steps": "1-2",
    "field": 3,
    "epochs": 1,
    "max_new_tokens": 8,
    "examples": 12,
    "batch_size": 4,
    "warmup": 0,
    "lora": 4,
    "save_every": 1,
}
GRPO = {
    "keep": 0,
    "steps": "1-2",
    "field": 3,
    "updates": 2,
    "prompts_per_update": 4,
    "group_size": 4,
    "eval_problems": 2,
    "max_new_tokens": 8,
    "keep_responses": 0,
    "lora": 4,
    "save_every": 1,
}


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.usefixtures("undrawn")
def test_from_pretrained_to_reinforced_and_resumed(precision, tmp_path, pretrained, monkeypatch):
    """Each stage writes a plain checkpoint and adapters; resuming is exact."""
    monkeypatch.setattr(Problem, "reward", lambda self, text, stopped: float(len(text)))
    flags = {"model": str(pretrained), "precision": precision, **SFT}
    sft = train_sft.main(train_sft.SftConfig(out=str(tmp_path / "sft"), **flags), ONE)
    (tmp_path / "sft" / "step-2").rename(tmp_path / "later")
    (tmp_path / "sft" / "step-3").rename(tmp_path / "whole")
    again = train_sft.main(
        train_sft.SftConfig(out=str(tmp_path / "sft"), resume=True, **flags), ONE
    )
    assert same_weights(load_model(again)[0], load_model(tmp_path / "whole")[0])
    assert not same_weights(load_model(again)[0], load_model(pretrained)[0])
    embeddings = [load_model(folder)[0].model.embed_tokens.weight for folder in (again, pretrained)]
    assert torch.equal(*embeddings)
    assert load_tokenizer(again).stops == [0, 2] and load_tokenizer(again).inner.chat_template

    flags = {"init": str(sft), "precision": precision, **GRPO}
    out = tmp_path / "rl"
    train_grpo.main(train_grpo.GrpoConfig(out=str(out), **flags), ONE)
    rows = read_log(out / "metrics.jsonl")
    assert len(rows) == 2 and all(row["kl"] >= 0 < row["grad_norm"] for row in rows)
    training = json.loads((out / "step-2" / "training.json").read_text())
    assert (training["lr"], training["beta"], training["temperature"]) == (1e-5, 0.05, 0.7)
    assert (training["examples"], training["lora_alpha"], training["lora_dropout"]) == (
        1024,
        128,
        0.05,
    )
    (out / "step-2").rename(tmp_path / "straight")
    train_grpo.main(train_grpo.GrpoConfig(out=str(out), resume=True, **flags), ONE)
    assert same_weights(load_model(out / "step-2")[0], load_model(tmp_path / "straight")[0])
    assert find_checkpoint(str(out)).name == "step-2"


def test_sampler_and_trainer_agree_through_adapters_and_the_base_is_the_reference():
    base = small_model()
    config = train_grpo.GrpoConfig(temperature=1.3, beta=0.05, lora=3, lora_dropout=0.0)
    fresh = add_lora(base, 3, 6, 0.0, torch.Generator().manual_seed(0))
    divergence = {}
    for name, policy in {"fresh": fresh, "moved": adapters_on(base)}.items():
        prompts = [[3, 4, 5], [6, 7]]
        rollout = Sampler(policy, [1], 4, 8, 1.3).sample(prompts, [(0,), (1,)])
        rollout.rewards = torch.tensor([[0.0, 1.0, 0.0, 1.0]] * 2)
        rollout.advantages = train_grpo.group_advantages(rollout.rewards)
        run = SimpleNamespace(config=config, master=policy, policy=policy, reference=base)
        metrics = backward(run, rollout, torch.arange(len(rollout.prompts)), 0, ONE)
        assert metrics["logp_diff_max"] < 1e-4
        assert all(w.grad is not None for w in trainable_parameters(policy))
        assert base.lm_head.weight.grad is None
        divergence[name] = metrics["kl"]
    assert divergence["fresh"] < 1e-6 < 1e-3 < divergence["moved"]


def test_adapters_have_the_flags_scale_and_dropout(pretrained):
    config = train_grpo.GrpoConfig(lora=4, lora_alpha=6, lora_dropout=0.1)
    master = load_master(config, pretrained, None, "fp32", torch.device("cpu"))
    assert {(x.adapter.scale, x.adapter.dropout) for x in adapted(master).values()} == {(1.5, 0.1)}
