"""How good a model is with some of its layers, scored on a text, reusing what stays the same.

Greedy and evolutionary plans ask for hundreds of scores of nearly equal sets of layers. A set that
agrees with an earlier one up to some slot starts from the residual stream kept there, so a score
costs only the layers after the first difference.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from engine.errors import InputError, NotFiniteError
from engine.reference.decoder import Decoder
from engine.reference.stream import DEFAULT_LIMIT_BYTES, step, storage
from engine.sample import NOT_FINITE

# Of logits that are computed at once: 24 MiB, which the C library keeps for the next ones, where
# the pages of larger blocks come and go.
LOGITS = 6 << 20
ROWS = 16  # positions whose softmax is taken at once: 3 MB of a vocabulary of 49,152


class Streams(Protocol):
    """What runs whole windows, from their first token on, through some slots of one model."""

    @property
    def total(self) -> int:
        """Slots of the model."""

    @property
    def vocab_size(self) -> int: ...

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 -> the residual stream (B, T, D) before the first slot."""

    def run(self, slots: Sequence[int], x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The stream (B, T, D) before these slots, ascending -> after them."""

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """The stream (B, T, D) after the last slot -> (B, T, V) float32."""


class DecoderStreams:
    """Of the reference."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.total = decoder, len(decoder.layers)
        self.vocab_size = decoder.config.vocab_size

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.decoder.embed(tokens)

    def run(self, slots: Sequence[int], x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(self.decoder.device)
        for slot in slots:
            x = step(self.decoder.config, slot, self.decoder.layers[slot], x, tokens)
        return x

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder.head(x)


class PrefixScorer:
    """Callable: kept slots, ascending -> loss or divergence on the text, lower is better.

    `windows` (W, T) int64 are run whole, `batch` at a time. `metric` "loss" is the mean negative
    log-likelihood of positions 1..T-1; "kl" is the mean KL(unpruned || pruned) over positions
    0..T-2, in nats. Both are deterministic. Memory: one residual stream (W, T, D) a slot of the
    anchored set; for "kl" also the unpruned model's probabilities (W, T - 1, V) float32, which lie
    in a file when they exceed 1 GiB.

    Both are sums of what is never negative: a score that is certain to exceed `most` is given up,
    and what it had come to is returned; `whole` tells whether the last one was not. One that is not
    finite raises `NotFiniteError`.
    """

    whole = True
    _kept: tuple[int, ...] = ()
    _held: list[list[torch.Tensor]]  # of a batch, at every slot of `_kept` and behind

    def __init__(
        self, model: Streams | Decoder, windows: torch.Tensor, metric: str = "kl", batch: int = 1
    ) -> None:
        if metric not in ("loss", "kl"):
            raise InputError(f"metric: expected 'loss' or 'kl', found {metric!r}")
        self.streams: Streams = DecoderStreams(model) if isinstance(model, Decoder) else model
        self.metric, self.most = metric, math.inf
        self.batches = windows.split(batch)
        self.positions = windows[:, 1:].numel()
        self.anchor(tuple(range(self.streams.total)))
        if metric == "kl":
            self._unpruned = [self._probabilities(own[-1]) for own in self._held]

    @torch.no_grad()
    def anchor(self, kept: tuple[int, ...], streams: Streams | None = None) -> None:
        """Keeps every boundary of this set; later scores start where they depart from it.

        `streams`: of the same model with other weights, which runs the sets from now on.
        """
        if streams is not None:
            self.streams, self._kept = streams, ()
        held = []
        for batch, tokens in enumerate(self.batches):
            shared = self._shared(kept)
            own = list(self._held[batch][: shared + 1]) if shared else [self.streams.embed(tokens)]
            for slot in kept[len(own) - 1 :]:
                own.append(self.streams.run([slot], own[-1], tokens))
            held.append(own)
        self._held, self._kept = held, kept

    @torch.no_grad()
    def __call__(self, kept: tuple[int, ...]) -> float:
        shared, total, self.whole = self._shared(kept), 0.0, False
        for batch, tokens in enumerate(self.batches):
            x = self.streams.run(kept[shared:], self._held[batch][shared], tokens)
            total += self._sum(x, tokens, batch)
            if total / self.positions > self.most:
                break
        else:
            self.whole = True
        if not math.isfinite(total):
            raise NotFiniteError(NOT_FINITE)
        return total / self.positions

    def _shared(self, kept: tuple[int, ...]) -> int:
        """How many leading slots agree with the anchored set."""
        shared = 0
        for ours, theirs in zip(kept, self._kept, strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    @torch.no_grad()
    def _probabilities(self, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of every window of a batch p (T - 1, V), and its sums (T - 1,) of p ln p."""
        found = []
        for window in x:
            held, sums = torch.empty(0), []
            for rows, log_p in self._log_softmax(window):
                if not len(held):
                    held = self._room(len(window) - 1, log_p)
                torch.exp(log_p, out=held[rows])
                sums.append(torch.linalg.vecdot(held[rows], log_p))
            found.append((held, torch.cat(sums)))
        return found

    def _room(self, rows: int, like: torch.Tensor) -> torch.Tensor:
        """(rows, V) float32 for a window."""
        shape, limit = (rows, like.shape[1]), DEFAULT_LIMIT_BYTES // sum(map(len, self.batches))
        if like.device.type != "cpu":
            return torch.empty(shape, device=like.device)
        return storage(math.prod(shape), torch.float32, limit).view(shape)

    def _sum(self, x: torch.Tensor, tokens: torch.Tensor, batch: int) -> float:
        total = torch.zeros((), dtype=torch.float64)
        for number, window in enumerate(x):
            for rows, log_q in self._log_softmax(window):
                if self.metric == "loss":
                    following = tokens[number, 1:][rows, None].to(log_q.device)
                    total -= log_q.gather(-1, following).double().sum().cpu()
                else:
                    p, own = self._unpruned[batch][number]
                    cross = torch.linalg.vecdot(p[rows], log_q)
                    total += (own[rows] - cross).double().sum().cpu()
        return float(total)

    def _log_softmax(self, x: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yields (positions, log-probabilities (n, V)) of a stream (T, D), its last left out."""
        rows = max(LOGITS // self.streams.vocab_size, 1)
        for start in range(0, len(x) - 1, rows):
            logits = self.streams.logits(x[None, start : min(start + rows, len(x) - 1)])[0]
            for at in range(0, len(logits), ROWS):
                part = logits[at : at + ROWS]
                yield slice(start + at, start + at + len(part)), part.log_softmax(-1)
