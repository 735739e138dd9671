"""On a GPU: the same tokens, log-probs and gradient as on the CPU, through graphs and the kernels of a GPU."""

import pytest
import torch
from conftest import small_model

from model import working_copy
from packed import pad
from rollout import Batch, Sampler
from runtime import World
from train_grpo import GrpoConfig, add_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]
REWARDS = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]])


def update(device: torch.device, precision: str):
    """A rollout, from graphs where there are any, and the gradient on it."""
    model = small_model(hidden_size=128).to(device)  # heads of 32, which the kernels take
    copy = working_copy(model, precision)
    sampler = Sampler(copy, [1], 4, 40)
    for _ in range(3):  # as it is, captured, replayed
        rollout = sampler.sample(PROMPTS, [(i,) for i in range(len(PROMPTS))])
    assert device.type == "cpu" or sum(graph is not None for graph in sampler.batch.graphs.values()) > 0
    world, config = World(0, 1, device), GrpoConfig()
    figures = add_gradient(model, copy, None, pad(PROMPTS, device), rollout, REWARDS.to(device), config, world)
    gradient = torch.cat([w.grad.flatten().cpu() for w in model.parameters()])
    return rollout, figures["logprob_difference"], gradient


def test_fp32_equals_the_cpu():
    (ours, difference, gradient), (theirs, _, expected) = (
        update(torch.device(name), "fp32") for name in ("cuda", "cpu")
    )
    assert torch.equal(ours.tokens.cpu(), theirs.tokens) and difference < 1e-4
    torch.testing.assert_close(ours.log_probs.cpu(), theirs.log_probs, atol=1e-4, rtol=0)
    assert (gradient - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("decode", ["attend_by_matmul", "attend_by_flash"])
def test_bf16_keeps_sampler_and_trainer_together(decode, monkeypatch):
    """The trainer attends with a varlen kernel, the sampler in the two ways it has on a GPU."""
    if decode == "attend_by_flash":
        pytest.importorskip("flash_attn")
    monkeypatch.setattr(Batch, "choose_attention", lambda self: getattr(self, decode))
    _, difference, gradient = update(torch.device("cuda"), "bf16")
    assert difference < 0.1 and gradient.isfinite().all() and gradient.norm() > 0
