"""Healing: the patches against least squares by hand, and what distillation promises."""

import json
import secrets
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import tiny
from support.close import assert_close
from torch.nn import functional

from engine.api import load
from engine.artifacts import HealRecord
from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.export.hf import prune
from engine.healing import distil
from engine.healing.data import Data
from engine.healing.heal import heal
from engine.healing.patch import RIDGE, patch
from engine.healing.replaced import Replaced
from engine.healing.settings import Cut, Settings, find_cuts
from engine.healing.teacher import Teacher, bins, divergence
from engine.reference.cache import KVCache
from engine.reference.decoder import load_decoder

WINDOW = 24
SETTINGS = Settings(("distil",), steps=24, lr=3e-3, window=WINDOW, batch_tokens=96, check_every=6)
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture
def data(rng) -> Data:
    def draw(count):
        return torch.randint(3, tiny.VOCAB, (count, WINDOW), generator=rng)

    return Data(draw(12), draw(4))


@torch.no_grad()
def boundaries(checkpoint, config, tokens) -> torch.Tensor:
    """(S + 1, T, D) float64 of tokens (1, T), the first left out."""
    found = []
    decoder = load_decoder(checkpoint, config)
    decoder.forward(tokens, KVCache(config, 1), tap=lambda _, x: found.append(x[0, 1:].double()))
    return torch.stack(found)


def logits(checkpoint, config, windows) -> torch.Tensor:
    cache = KVCache(config, len(windows))
    return load_decoder(checkpoint, config).forward(windows, cache, logits="all")


def kl(checkpoint, config, whole, windows) -> float:
    p, q = (logits(*each, windows).log_softmax(-1) for each in (whole, (checkpoint, config)))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_cuts_are_the_runs_that_are_missing(source):
    config = source("llama", num_hidden_layers=9).config
    assert find_cuts(config.keep([0, 1, 4, 6, 7])) == [Cut(2, 4), Cut(5, 6), Cut(8, 9)]
    assert find_cuts(config.keep([2, 3])) == [Cut(0, 2), Cut(4, 9)]
    assert find_cuts(config) == []


@pytest.mark.parametrize("case, overrides", [("llama", BIASED), ("phi2", {}), ("phi3", {})])
def test_the_linear_patch_is_least_squares(case, overrides, source, data):
    """Against numpy: M, R and E are read off the models' boundaries and the down projection."""
    checkpoint = source(case, num_hidden_layers=7, **overrides)
    whole = checkpoint.config
    config = whole.keep([0, 1, 4, 6])  # the second cut is measured behind the first patch
    batches = data.spread()
    changed = patch("linear", checkpoint, config, batches)
    down = "mlp.fc2" if case == "phi2" else "mlp.down_proj"
    biased = {"weight", "bias"} if case != "phi3" else {"weight"}
    assert set(changed) == {f"model.layers.{n}.{down}.{kind}" for n in (1, 4) for kind in biased}
    for layer, slot, end in ((1, 1, 4), (4, 2, 6)):
        first = {name: x for name, x in changed.items() if f"layers.{layer}." not in name}
        before = Replaced(checkpoint, first if layer == 4 else {})
        patched = Replaced(checkpoint, changed)
        e = torch.cat([boundaries(checkpoint, whole, x)[end] for x in batches])
        r = torch.cat([boundaries(before, config, x)[slot + 1] for x in batches])
        name = f"model.layers.{layer}.{down}"
        weight = before.read(f"{name}.weight").double()
        new = patched.read(f"{name}.weight").double()
        # All that the patch may change is T: with the same inner activations, T'W and T'b.
        t = torch.linalg.lstsq(weight.T, new.T).solution if weight.shape[1] >= 48 else None
        after = torch.cat([boundaries(patched, config, x)[slot + 1] for x in batches])
        m = (after - r) @ torch.linalg.inv(t - torch.eye(len(t), dtype=t.dtype))
        gram = (m.T @ m).numpy()
        ridge = np.sqrt(RIDGE * gram.diagonal().mean())
        rows = np.concatenate([m.numpy(), ridge * np.eye(len(gram))])
        wanted = np.concatenate([(e - r + m).numpy(), np.zeros_like(gram)])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        assert_close("T", t, torch.from_numpy(expected), 2e-2)
        assert (after - e).norm() < (r - e).norm()
