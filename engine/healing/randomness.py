"""Random numbers of a training: seeded by its settings, and nobody else's."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(seed: int, index: int) -> int:
    """The seed of one of a run's draws. Seeds lie apart: seed 0's second is not seed 1's first."""
    return seed * 1_000_003 + index


@contextmanager
def own_randomness() -> Iterator[None]:
    """What is drawn inside, by transformers too, leaves the caller's generators as they were."""
    import numpy

    held = random.getstate(), numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(held[0])
        numpy.random.set_state(held[1])
