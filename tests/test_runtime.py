"""Flags from a data class, and random streams from their keys."""

import sys
from dataclasses import dataclass
from typing import Literal

import torch

from runtime import World, parse_flags, stream, torch_stream


@dataclass
class Config:
    """Not a flag: text here  # nor here"""

    out_folder: str = "x"  # where things go
    count: int | None = None  # how many [7]
    share: float = 0.5  # between 0% and 100%
    loud: bool = False  # whether to shout
    colour: Literal["red", "blue"] = "red"  # of the line


def parse(flags: str, monkeypatch) -> Config:
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    return parse_flags(Config, "A test.")


def test_flags_have_the_types_and_defaults_of_the_fields(monkeypatch):
    assert parse("", monkeypatch) == Config()
    given = parse("--out-folder a --count 3 --share 1e-1 --loud --colour blue", monkeypatch)
    assert given == Config("a", 3, 0.1, True, "blue")


def test_streams_repeat_by_key_and_differ_between_keys():
    keys = [(0, "a", 1, 0), (0, "a", 1, 1), (0, "a", 2, 0), (0, "b", 1, 0), (1, "a", 1, 0), (0, "a1", 0)]
    draws = [stream(*key).random() for key in keys]
    assert draws == [stream(*key).random() for key in keys] and len(set(draws)) == len(keys)
    noise = [torch.rand(3, generator=torch_stream(*key)) for key in keys]
    assert torch.equal(noise[0], torch.rand(3, generator=torch_stream(*keys[0])))
    assert not torch.equal(noise[0], noise[1])


def test_one_process_sums_to_itself():
    world = World(0, 1, torch.device("cpu"))
    assert world.leads and world.sum(1, 2.5) == [1, 2.5] and world.gather([1, 2]) == [1, 2]
