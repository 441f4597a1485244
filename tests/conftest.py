"""Fixtures that every test may use."""

import secrets

import pytest
import torch


@pytest.fixture
def rng() -> torch.Generator:
    """A generator seeded afresh; the printed seed (shown on failure) reproduces the test."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)
