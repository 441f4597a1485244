"""Profiles to test with: of tiny models beside transformers, and random ones."""

import random
from dataclasses import replace

import torch
from support import tiny

from engine.artifacts import Profile
from engine.checkpoint import open_checkpoint
from engine.pruning.profile import describe, measure, merge
from engine.reference.decoder import Decoder
from engine.runtime.reference import ReferenceRuntime


class Case:
    """A tiny model, its transformers twin, and samples of unequal length that begin with BOS."""

    def __init__(self, family: str, directory, seed: int) -> None:
        self.peer = tiny.write(family, directory, seed)
        self.checkpoint = open_checkpoint(directory)
        self.config = self.checkpoint.config
        self.decoder: Decoder = ReferenceRuntime.load(self.checkpoint, self.config).decoder
        lengths = [30, 7, 1, 19, 30, 12, 25, 3, 40]
        self.samples = [[1, *torch.randint(3, tiny.VOCAB, (n,)).tolist()] for n in lengths]

    def source(self, tokens: str = "last", **changes):
        source = describe("tiny", self.checkpoint, self.config, self.samples, tokens, bos=True)
        return replace(source, **changes)

    def profile(self, tokens: str = "last", **options) -> Profile:
        return merge([measure(self.decoder, self.samples, self.source(tokens), **options)])

    @torch.no_grad()
    def boundaries(self, sample: list[int]) -> torch.Tensor:
        """(L + 1, T, D) float64: what transformers' layers receive, and what the last one gives."""
        states = []
        layers = self.peer.model.layers

        def first(_, args, kwargs):
            states.append(args[0] if args else kwargs["hidden_states"])

        def last(_, args, kwargs, output):
            states.append(output[0] if isinstance(output, tuple) else output)

        hooks = [layer.register_forward_pre_hook(first, with_kwargs=True) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(last, with_kwargs=True))
        self.peer(torch.tensor([sample]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return torch.cat([state.reshape(1, len(sample), -1) for state in states]).double()


def angles(vectors: torch.Tensor) -> torch.Tensor:
    """(L + 1, L + 1) mean angular distance of vectors (L + 1, B, D) float64, one pair at a time."""
    count = len(vectors)
    table = torch.zeros(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            u, v = (x / x.norm(dim=-1, keepdim=True) for x in (vectors[i], vectors[j]))
            half = torch.atan2((u - v).norm(dim=-1), (u + v).norm(dim=-1))
            table[i, j] = (2 * half / torch.pi).mean()
    return table


def largest_difference(profile: Profile, table: torch.Tensor) -> float:
    total = len(profile.layers)
    return max(
        abs(profile.distance(start, count) - float(table[start, start + count]))
        for count in range(1, total + 1)
        for start in range(total - count + 1)
    )


def make_profile(total: int, rng: random.Random, **changes) -> Profile:
    rows = tuple(tuple(rng.random() for _ in range(total - n)) for n in range(total))
    values = {
        "model": "random",
        "architecture": "a",
        "lineage": "b",
        "total_layers": total,
        "layers": tuple(range(total)),
        "distances": rows,
        "standard_errors": rows,
        "influence": tuple(rng.random() for _ in range(total)),
        "magnitude": tuple(rng.random() for _ in range(total)),
        "metric": "angular",
        "tokens": "last",
        "samples": 4,
        "vectors": 4,
        "tokens_used": 40,
        "length": 10,
        "bos": False,
        "text_hash": "c",
    }
    return Profile(**values | changes)
