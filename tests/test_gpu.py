"""On a GPU, with its kernels and graphs: the CPU's tokens, log-probs and gradient."""

from types import SimpleNamespace

import pytest
import torch
from conftest import backward, small_model, with_large_biases

from lib.distributed import World
from lib.lora import add_lora
from lib.policy import DTYPES, cast_matmuls, make_policy, trainable_parameters
from rollout import Sampler
from train_grpo import GrpoConfig, group_advantages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]])


def update(device: torch.device, precision: str, lora: bool = False, model_type: str = "qwen3"):
    """Return a rollout, its largest log-prob difference and its gradient; a GPU uses graphs."""
    # The kernels take heads of 32.
    model = small_model(hidden_size=128, model_type=model_type)
    model = (with_large_biases(model) if model_type == "qwen2" else model).to(device)
    if lora:
        model = add_lora(
            cast_matmuls(model, DTYPES[precision]), 4, 8, 0.0, torch.Generator().manual_seed(0)
        )
    policy = make_policy(model, precision)
    sampler = Sampler(policy, [1], 4, 40)
    for _ in range(3):  # eager, captured, replayed
        rollout = sampler.sample(PROMPTS, [(i,) for i in range(len(PROMPTS))])
    if device.type == "cuda":
        assert any(graph is not None for graph in sampler.batch.graphs.values())
    world, config = World(0, 1, device), GrpoConfig(temperature=1.0)
    rollout.rewards = REWARDS.to(device)
    rollout.advantages = group_advantages(rollout.rewards)
    run = SimpleNamespace(config=config, master=model, policy=policy, reference=None)
    run.optimizer = torch.optim.AdamW(trainable_parameters(model))  # whose moments are to come
    metrics = backward(run, rollout, torch.arange(len(PROMPTS)), 0, world)
    gradient = torch.cat([w.grad.flatten().cpu() for w in trainable_parameters(model)])
    return rollout, metrics["logp_diff_max"], gradient


@pytest.mark.parametrize("lora", [False, True])
def test_fp32_equals_the_cpu(lora):
    (ours, difference, gradient), (theirs, _, expected) = (
        update(torch.device(name), "fp32", lora) for name in ("cuda", "cpu")
    )
    assert torch.equal(ours.tokens.cpu(), theirs.tokens) and difference < 1e-4
    torch.testing.assert_close(ours.logps.cpu(), theirs.logps, atol=1e-4, rtol=0)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("decode", ["matmul", "flash"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type, bound", [("qwen3", 0.1), ("qwen2", 0.2)])
def test_bf16_keeps_sampler_and_trainer_together(model_type, bound, lora, decode, monkeypatch):
    """The trainer uses a varlen kernel, the sampler each of its two back-ends for GPUs."""
    if decode == "flash":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr("lib.attention.decode_backend", lambda model: decode)
    _, difference, gradient = update(torch.device("cuda"), "bf16", lora, model_type)
    assert difference < bound and gradient.isfinite().all() and gradient.norm() > 0
