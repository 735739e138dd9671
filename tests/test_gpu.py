"""The same tokens, log-probs and gradient on a GPU as on the CPU."""

import pytest
import torch
from conftest import small_model

from model import flash_attn_varlen_func, pad
from rollout import sample
from runtime import World
from train_grpo import GrpoConfig, add_gradient

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
PROMPTS = [[3, 4, 5, 6, 7], [8], [9, 10, 11]]


def test_sampler_and_gradient():
    tolerance = 1e-4 if flash_attn_varlen_func is None else 3e-2  # flash-attn computes in bf16
    tokens, log_probs, gradients = [], [], []
    for device in (torch.device("cpu"), torch.device("cuda", 0)):
        model = small_model().to(device)
        rollout = sample(model, PROMPTS, [1], torch.Generator().manual_seed(0), 4, 12)
        rewards = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1, 1, 1, 1]], device=device)
        figures = add_gradient(model, None, pad(PROMPTS, device), rollout, rewards, GrpoConfig(), World(0, 1, device))
        assert figures["logprob_difference"] < tolerance
        tokens.append(rollout.tokens.cpu())
        log_probs.append(rollout.log_probs.cpu())
        gradients.append(torch.cat([w.grad.flatten().cpu() for w in model.parameters()]))
    if flash_attn_varlen_func is None:
        assert torch.equal(*tokens)
        torch.testing.assert_close(*log_probs, atol=1e-4, rtol=0)
        assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()
