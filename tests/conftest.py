"""Fixtures that every test may use."""

import secrets
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from engine.errors import InputError

# No deadline: a test on a busy machine is slow, not wrong. The blob reproduces a failure.
settings.register_profile("shallow", deadline=None, print_blob=True)
settings.load_profile("shallow")


@pytest.fixture
def rng() -> torch.Generator:
    """A generator seeded afresh; the printed seed (shown on failure) reproduces the test."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def default_model() -> Path:
    """The default model's GGUF: from the cache, or fetched; skipped where neither is possible."""
    from engine.checkpoint.locate import locate

    try:
        return locate("smollm2-135m")
    except InputError as error:
        pytest.skip(f"the default model is neither here nor to be fetched: {error}")
