"""A small random model that every test can afford."""

import socket

import pytest
import torch

from checkpoint import word_tokenizer
from model import ModelConfig, Transformer


def small_model(seed: int = 0, **shape) -> Transformer:
    """Random weights large enough for distributions to be far from uniform."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | shape
    model = Transformer(ModelConfig(vocab_size=len(word_tokenizer(11)), **sizes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.2, generator=generator)
    return model


@pytest.fixture
def model() -> Transformer:
    return small_model()


@pytest.fixture
def tokenizer():
    return word_tokenizer(11)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def same_weights(a: Transformer, b: Transformer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
