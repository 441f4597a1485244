"""Tiny models to heal, and text that they wrote themselves."""

from contextlib import contextmanager

import torch
from support import tiny

from engine.healing.data import Data
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


def draw(checkpoint, rng) -> Data:
    return Data(*written(checkpoint, 60, rng).split([48, 12]))


def shortened(checkpoint):
    return checkpoint.config.keep([0, 2, *range(3, checkpoint.config.total_layers)])


def logits(checkpoint, config, windows) -> torch.Tensor:
    cache = KVCache(config, len(windows))
    return load_decoder(checkpoint, config).forward(windows, cache, logits="all")


def kl(whole, found) -> float:
    p, q = whole.log_softmax(-1), found.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@contextmanager
def killing(label):
    def report(done, total, note=""):
        if label == "steps" and done == 10:
            raise KeyboardInterrupt

    yield report
