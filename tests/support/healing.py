"""Tiny models to heal, and text that they wrote themselves."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from support import tiny

from engine.healing.data import Data
from engine.healing.heal import heal
from engine.reference.cache import KVCache
from engine.reference.decoder import load_decoder

WINDOW = 24


@torch.no_grad()
def written(checkpoint, count: int, rng: torch.Generator) -> torch.Tensor:
    """(count, WINDOW) ids that the model itself draws: what it predicts best."""
    decoder = load_decoder(checkpoint, checkpoint.config)
    cache = KVCache(checkpoint.config, count)
    tokens = [torch.randint(3, tiny.VOCAB, (count, 1), generator=rng)]
    while len(tokens) < WINDOW:
        shares = decoder.forward(tokens[-1], cache)[:, 0].softmax(-1)
        tokens.append(torch.multinomial(shares, 1, generator=rng))
    return torch.cat(tokens, dim=1)


def draw(checkpoint, rng, windows: int = 48, held_out: int = 12) -> Data:
    return Data(*written(checkpoint, windows + held_out, rng).split([windows, held_out]))


def shortened(checkpoint):
    return checkpoint.config.keep([0, 2, *range(3, checkpoint.config.total_layers)])


def logits(checkpoint, config, windows) -> torch.Tensor:
    cache = KVCache(config, len(windows))
    return load_decoder(checkpoint, config).forward(windows, cache, logits="all")


def kl(whole, found) -> float:
    p, q = whole.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def killed_at(what: str, count: int):
    """A reporting that ends the run once so many of `what` are done."""

    @contextmanager
    def reporting(label):
        def report(done, total, note=""):
            if label == what and done >= count:
                raise KeyboardInterrupt

        yield report

    return reporting


killing = killed_at("steps", 10)


def same_after_a_kill(checkpoint, config, data, directory, settings):
    """The record of a run that nothing stopped; one that is killed and goes on gives its bits."""
    given = {"dtype": torch.float32}
    straight = heal(checkpoint, config, data, directory / "a", settings, **given)
    with pytest.raises(KeyboardInterrupt):
        heal(checkpoint, config, data, directory / "b", settings, reporting=killing)
    assert not (directory / "b").exists()
    resumed = heal(checkpoint, config, data, directory / "b", settings, **given)
    assert resumed.losses == straight.losses and resumed.checks == straight.checks
    first, second = (load_file(directory / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    return straight
