"""Random streams, each made anew from its key, so that a resumed run has no RNG state to restore.

Those of sampling are (seed, "sampling", update, prompt): each prompt has its own, so that its
random numbers do not depend on its batch or process.
"""

import random

import torch


def rng(*key: int | str) -> random.Random:
    """Return Python's generator for a key."""
    return random.Random(repr(key))


def torch_rng(*key: int | str) -> torch.Generator:
    """Return PyTorch's generator, on the CPU, for a key."""
    return torch.Generator().manual_seed(rng(*key).getrandbits(63))


def epoch_indices(seed: int, size: int, first: int, n: int) -> list[int]:
    """Return indices [first, first + n) of an endless sequence of shuffled epochs of `size`."""
    positions = [divmod(i, size) for i in range(first, first + n)]
    orders = {epoch: list(range(size)) for epoch, _ in positions}
    for epoch, order in orders.items():
        rng(seed, "order", epoch).shuffle(order)
    return [orders[epoch][position] for epoch, position in positions]
