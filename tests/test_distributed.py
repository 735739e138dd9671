"""Flags from a data class, random streams from their keys, sums over processes, threads."""

import sys
import threading
from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from lib.distributed import World, in_threads, init_distributed
from lib.flags import parse_flags
from lib.rng import epoch_indices, rng, torch_rng


@dataclass
class Config:
    """Not a flag: text here  # nor here"""

    out_folder: str = "x"  # where things go
    count: int | None = None  # how many [7]
    share: float = 0.5  # between 0% and 100%
    loud: bool = False  # whether to shout
    plain: int = 2
    colour: Literal["red", "blue"] = "red"  # of the line


def parse(flags: str, monkeypatch) -> Config:
    monkeypatch.setattr(sys, "argv", ["x", *flags.split()])
    return parse_flags(Config, "A test.")


def test_flags_have_the_types_and_defaults_of_the_fields(monkeypatch):
    assert parse("", monkeypatch) == Config()
    words = "--out-folder a --count 3 --share 1e-1 --loud --plain 5 --colour blue"
    assert parse(words, monkeypatch) == Config("a", 3, 0.1, True, 5, "blue")


def test_streams_repeat_by_key_and_differ_between_keys():
    keys = [
        (0, "a", 1, 0),
        (0, "a", 1, 1),
        (0, "a", 2, 0),
        (0, "b", 1, 0),
        (1, "a", 1, 0),
        (0, "a1", 0),
    ]
    draws = [rng(*key).random() for key in keys]
    assert draws == [rng(*key).random() for key in keys] and len(set(draws)) == len(keys)
    noise = [torch.rand(3, generator=torch_rng(*key)) for key in keys]
    assert torch.equal(noise[0], torch.rand(3, generator=torch_rng(*keys[0])))
    assert not torch.equal(noise[0], noise[1])


def test_a_world_size_that_no_torchrun_has_set_is_told(monkeypatch, capsys):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        init_distributed()
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "WORLD_SIZE is set" in line


def test_one_process_sums_to_itself():
    world = World(0, 1, torch.device("cpu"))
    assert world.is_master
    assert world.all_reduce(1, 2.5) == [1, 2.5] and world.all_gather([1, 2]) == [1, 2]


def test_threads_work_side_by_side(monkeypatch):
    """Results keep their order, errors are raised, and the caller keeps its number of threads."""
    monkeypatch.setattr("lib.distributed.n_threads", lambda device: 3)
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    names = in_threads(
        lambda i: (i, threading.current_thread().name, torch.get_num_threads()), range(7), cpu
    )
    assert [i for i, *_ in names] == list(range(7)) and {n for *_, n in names} == {1}
    assert threading.main_thread().name not in {name for _, name, _ in names}
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda i: 1 / i, [1, 0], cpu)
    (alone,) = in_threads(lambda _: threading.current_thread().name, [0], cpu)
    assert alone != threading.main_thread().name, (
        "a single item, too: the main thread would keep compiled products and memory of its own"
    )


def test_streams_are_named_by_all_parts_of_their_keys_and_orders_by_the_seed():
    assert len({rng(*key).random() for key in ((1, 23), (12, 3), (123,), ("1", 23))}) == 4
    orders = [epoch_indices(seed, 50, 0, 50) for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
