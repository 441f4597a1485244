"""How good a model is with some of its layers, scored on a text, reusing what stays the same.

Greedy and evolutionary plans ask for hundreds of scores of nearly equal sets of layers. A set that
agrees with an earlier one up to some slot starts from the residual stream kept there, so a score
costs only the layers after the first difference.
"""

import torch

from engine.errors import InputError
from engine.reference.decoder import Decoder
from engine.reference.stream import step


class PrefixScorer:
    """Callable: kept slots, ascending -> loss or divergence on the text, lower is better.

    `windows` (W, T) int64 are run whole. `metric` "loss" is the mean negative log-likelihood of
    positions 1..T-1; "kl" is the mean KL(unpruned || pruned) over positions 0..T-2, in nats. Both
    are deterministic. Memory: one residual stream (W, T, D) a slot of the anchored set.
    """

    _kept: tuple[int, ...] = ()
    _streams: list[list[torch.Tensor]]  # of a batch, at every slot of `_kept` and behind

    def __init__(
        self, decoder: Decoder, windows: torch.Tensor, metric: str = "kl", batch: int = 4
    ) -> None:
        if metric not in ("loss", "kl"):
            raise InputError(f"metric: expected 'loss' or 'kl', found {metric!r}")
        self.decoder, self.metric = decoder, metric
        self.batches = windows.to(decoder.device).split(batch)
        self.evaluations = 0
        self.anchor(tuple(range(len(decoder.layers))))
        self._unpruned = [streams[-1] for streams in self._streams]

    @torch.no_grad()
    def anchor(self, kept: tuple[int, ...], score: float | None = None) -> None:
        """Keeps every boundary of this set; later scores start where they depart from it."""
        streams = []
        for batch, tokens in enumerate(self.batches):
            shared = self._shared(kept)
            own = list(self._streams[batch][: shared + 1]) if shared else [self._embed(tokens)]
            for slot in kept[len(own) - 1 :]:
                own.append(self._run(slot, own[-1], tokens))
            streams.append(own)
        self._streams, self._kept = streams, kept

    @torch.no_grad()
    def __call__(self, kept: tuple[int, ...]) -> float:
        self.evaluations += 1
        shared = self._shared(kept)
        total = torch.zeros((), dtype=torch.float64)
        for batch, tokens in enumerate(self.batches):
            x = self._streams[batch][shared]
            for slot in kept[shared:]:
                x = self._run(slot, x, tokens)
            total += self._sum(x, tokens, batch)
        return float(total) / sum(tokens[:, 1:].numel() for tokens in self.batches)

    def _shared(self, kept: tuple[int, ...]) -> int:
        """How many leading slots agree with the anchored set."""
        shared = 0
        for ours, theirs in zip(kept, self._kept, strict=False):
            if ours != theirs:
                break
            shared += 1
        return shared

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(tokens, self.decoder.outer["embedding"])
        return rows * torch.tensor(self.decoder.config.embedding_scale, dtype=rows.dtype)

    def _run(self, slot: int, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return step(self.decoder.config, slot, self.decoder.layers[slot], x, tokens)

    def _sum(self, x: torch.Tensor, tokens: torch.Tensor, batch: int) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(len(tokens)):  # a window at a time bounds the logits
            log_q = self.decoder.head(x[row : row + 1, :-1])[0].log_softmax(-1)
            if self.metric == "loss":
                total -= log_q.gather(-1, tokens[row, 1:, None]).double().sum().cpu()
                continue
            unpruned = self._unpruned[batch][row : row + 1, :-1]
            log_p = self.decoder.head(unpruned)[0].log_softmax(-1)
            total += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum().cpu()
        return total
