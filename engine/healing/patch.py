"""Patches without training: least squares at each cut, folded into weights that are there already.

With M (n, D) the output of the last kept layer's MLP, R the residual stream after that layer and
E the whole model's at the end of the cut, all over tokens:

    linear  M T ~ E - (R - M), each token's error over the length of its E, since the layers that
            follow see the stream through a norm: the down projection W becomes T'W (ReplaceMe,
            Shopkhoev et al., 2505.02819).
    scale   s R ~ E. The layers that follow see their input through a norm, which a factor does not
            pass, so that dividing all that they add by s is the same as multiplying R by s.
"""

from collections.abc import Callable, Sequence

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import layer_parts
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import Observed, Weights, load_layer
from engine.healing.settings import Cut, find_cuts
from engine.reference.decoder import linear as product
from engine.reference.stream import HiddenStates, open_states, step

RIDGE = 1e-4  # of the Gram matrix's mean diagonal
ADDED = ("o", "o.bias", "down", "down.bias")  # what a layer adds to the stream is linear in these

Progress = Callable[[int, int], None]  # (layers done, in all)


def patch(
    method: str,
    checkpoint: Checkpoint,
    config: ModelConfig,
    batches: Sequence[torch.Tensor],
    progress: Progress | None = None,
) -> dict[str, torch.Tensor]:
    """The tensors of `checkpoint` that change, by name, for the layers that `config` keeps.

    `batches` are (B, T) tokens, left-padded with -1. Cuts are mended from left to right, each
    measured in the model that is pruned and patched as far as it.
    """
    both = Both(checkpoint, config, batches)
    changed: dict[str, torch.Tensor] = {}
    scale = 1.0
    cuts = find_cuts(config)
    for cut in cuts:
        if method == "linear":
            both.run_to(cut, progress=progress, total=cuts[-1].stop)
            changed |= both.fold(cut, solve(*both.gram()))
        else:
            both.run_to(cut, scale, progress, cuts[-1].stop)
            scale *= both.magnitude(scale)
            following = next((c.start for c in cuts if c.start > cut.start), config.total_layers)
            changed |= divided(checkpoint, range(cut.stop, following), scale)
    return changed


def solve(gram: torch.Tensor, cross: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """T (D, D) float64, of the least |M T - Y|: `gram` is M'M, `cross` M'Y."""
    weight = ridge * gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + weight * eye, cross)


def divided(checkpoint: Checkpoint, layers: range, scale: float) -> dict[str, torch.Tensor]:
    """What these layers add to the stream, divided by `scale`."""
    changed: dict[str, torch.Tensor] = {}
    for layer in layers:
        parts = layer_parts(checkpoint.config, layer)
        weights = load_layer(checkpoint, checkpoint.config, layer)
        changed |= {parts[r].name: weights[r].float() / scale for r in ADDED if r in weights}
    return changed


class Both:
    """The whole model and the pruned one side by side, a layer in memory at a time."""

    def __init__(
        self, checkpoint: Checkpoint, config: ModelConfig, batches: Sequence[torch.Tensor]
    ) -> None:
        self.checkpoint, self.batches = checkpoint, batches
        self.config = checkpoint.config
        self.kept = {entry.layer for entry in config.layers}
        self.whole = open_states(checkpoint, self.config, batches)
        self.pruned = open_states(checkpoint, self.config, batches)
        shapes = [(*tokens.shape, config.hidden_size) for tokens in batches]
        self.outputs = HiddenStates(shapes, torch.float32)  # of the MLP before the cut
        self.layer, self.parted = 0, False

    @torch.no_grad()
    def run_to(
        self, cut: Cut, scale: float = 1.0, progress: Progress | None = None, total: int = 0
    ) -> None:
        """Through layer `cut.stop` - 1; kept layers add what they add divided by `scale`."""
        for layer in range(self.layer, cut.stop):
            weights = load_layer(self.checkpoint, self.config, layer)
            self.parted = self.parted or layer not in self.kept
            for index in range(len(self.batches)):
                self._step(layer, weights, index, scale, layer == cut.start - 1)
            if progress is not None:
                progress(layer + 1, total)
        self.layer = cut.stop

    def _step(self, layer: int, weights: Weights, index: int, scale: float, last: bool) -> None:
        tokens, before = self.batches[index], self.pruned[index]
        if layer in self.kept:
            inputs: list[torch.Tensor] = []
            observed = Observed(weights, lambda r, x: inputs.append(x) if r == "down" else None)
            after = step(self.config, layer, observed, before * scale, tokens) / scale
            if last:
                self.outputs.put(index, product(inputs[0], weights, "down"))
            self.pruned.put(index, after)
        if self.parted:
            after = step(self.config, layer, weights, self.whole[index], tokens)
        self.whole.put(index, after)

    def gram(self) -> tuple[torch.Tensor, torch.Tensor]:
        """M'M and M'(E - R + M), (D, D) float64 each, of rows divided by the length of E's.

        So the first token of a sample, on which attention rests, counts like any other though its
        stream may be a hundred times as long. Left out it would be thrown anywhere by T.
        """
        width = self.config.hidden_size
        gram = torch.zeros(width, width, dtype=torch.float64)
        cross = torch.zeros_like(gram)
        for index in range(len(self.batches)):
            m, r, e = self._vectors(index, first=0)
            weighed = (m / e.square().sum(1, keepdim=True)).T
            gram += weighed @ m
            cross += weighed @ (e - r + m)
        return gram, cross

    def magnitude(self, scale: float) -> float:
        """s of the least |s R - E / scale|: `scale` is what earlier cuts have asked for.

        Over all but the first token of a sample, whose length is that of a hundred others.
        """
        over = under = 0.0
        for index in range(len(self.batches)):
            _, r, e = self._vectors(index, first=1)
            over, under = over + float((r * e).sum()) / scale, under + float((r * r).sum())
        return over / under

    def fold(self, cut: Cut, t: torch.Tensor) -> dict[str, torch.Tensor]:
        """The down projection before the cut with T in it; the pruned model goes on from there."""
        layer = cut.start - 1
        weights = load_layer(self.checkpoint, self.config, layer)
        parts = layer_parts(self.config, layer)
        changed = {parts["down"].name: (t.T @ weights["down"].double()).float()}
        if "down.bias" in weights:
            changed[parts["down.bias"].name] = (weights["down.bias"].double() @ t).float()
        for index in range(len(self.batches)):
            m = self.outputs[index].double()
            self.pruned.put(index, (self.pruned[index] + (m @ t - m)).float())
        return changed

    def _vectors(self, index: int, first: int) -> tuple[torch.Tensor, ...]:
        """M, R and E (n, D) float64 at the tokens of a batch, from a sample's `first` on."""
        real = self.batches[index] >= 0
        counts = real & (real.cumsum(dim=1) > first)
        streams = (self.outputs, self.pruned, self.whole)
        return tuple(stream[index][counts].double() for stream in streams)
