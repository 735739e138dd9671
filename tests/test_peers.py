"""The benchmark's peers compute what ours computes."""

import pytest
import torch

import rollout
from lib.distributed import World
from lib.packing import pack, response_logps
from lib.transformer import ModelConfig
from paper import peers
from paper.bench import Machine, Ours, Work

WORK = Work(ModelConfig(512, 64, 128, 2), prompts=2, group=3, prompt_len=9, new_tokens=6)


@pytest.mark.parametrize("precision, close", [("fp32", 0.02), ("bf16", 0.1)])
def test_llama_cpp_samples_from_our_distribution(precision, close, monkeypatch):
    """Under each setting, whose tokens differ as their random numbers do; its cache has 16 bits."""
    pytest.importorskip("llama_cpp")
    ours = Ours(WORK, Machine(World(0, 1, torch.device("cpu")), precision, 1, 1.0, 1.0))
    with torch.no_grad():
        for weight in ours.policy.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2)
        for weight, mine in zip(ours.master.parameters(), ours.policy.parameters()):
            weight.copy_(mine)
    theirs = []

    def sample_tokens(*args):
        tokens, logps = rollout.sample_tokens(*args)
        theirs.append(logps)
        return tokens, logps

    monkeypatch.setattr(peers, "sample_tokens", sample_tokens)
    for call in peers.llama_cpp_rollouts(ours, precision):
        theirs.clear()
        tokens = call()  # (B, T)
        prompts, lengths = torch.tensor(ours.prompts), torch.full((2,), 9)
        groups = torch.arange(2).repeat_interleave(3)
        batch = pack(prompts, lengths, tokens, torch.full((6,), 6), groups)
        with torch.no_grad():
            logps, _ = response_logps(ours.policy, batch)
        assert (logps - torch.stack(theirs, 1).flatten()).abs().max() < close
        assert logps.std() > 0.5  # far from uniform
