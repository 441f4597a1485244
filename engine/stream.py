"""A checkpoint one layer at a time: hidden states are carried along, weights come and go.

What a model needs in memory is then one layer and the hidden states of all samples, and those
move to a file when they exceed a limit: a 70B model is profiled or quantised on a laptop.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from engine.cache import KVCache
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.model import Angles, run_layer
from engine.weights import Weights, load_layer, load_outer

DEFAULT_LIMIT_BYTES = 1 << 30

Visit = Callable[[int, int, torch.Tensor], None]  # (boundary, batch, hidden states (B, T, D))


class HiddenStates:
    """The residual streams of all batches: in memory, or in an unnamed file beyond the limit."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        directory: Path | None = None,
    ) -> None:
        sizes = [rows * steps * width for rows, steps, width in shapes]
        total = sum(sizes)
        self.on_disk = total * dtype.itemsize > limit_bytes
        if self.on_disk:
            with tempfile.NamedTemporaryFile(dir=directory) as file:
                flat = torch.from_file(file.name, shared=True, size=total, dtype=dtype)
        else:
            flat = torch.empty(total, dtype=dtype)
        self._batches = [
            piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)
        ]

    def __getitem__(self, batch: int) -> torch.Tensor:
        return self._batches[batch]

    def __setitem__(self, batch: int, states: torch.Tensor) -> None:
        self._batches[batch].copy_(states)

    def __len__(self) -> int:
        return len(self._batches)


@torch.no_grad()
def stream(
    checkpoint: Checkpoint,
    config: ModelConfig,
    batches: Sequence[torch.Tensor],
    visit: Visit,
    *,
    dtype: torch.dtype = torch.float32,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    directory: Path | None = None,
) -> None:
    """Runs token batches (B, T), left-padded with -1, through all layers, one layer in memory.

    `visit` is shown every boundary of every batch: 0 .. S-1 before each slot, and S after the
    last layer, before the final norm. Hidden states beyond `limit_bytes` live in a file.
    """
    states = embed(checkpoint, config, batches, dtype, limit_bytes, directory)
    for slot, _, weights in layers(checkpoint, config, dtype):
        for index, tokens in enumerate(batches):
            visit(slot, index, states[index])
            states[index] = step(config, slot, weights, states[index], tokens)
    for index in range(len(batches)):
        visit(len(config.layers), index, states[index])


def embed(
    checkpoint: Checkpoint,
    config: ModelConfig,
    batches: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    directory: Path | None = None,
) -> HiddenStates:
    """Boundary 0 of every batch."""
    table = load_outer(checkpoint, config)["embedding"]
    shapes = [(*tokens.shape, config.hidden_size) for tokens in batches]
    states = HiddenStates(shapes, dtype, limit_bytes, directory)
    for index, tokens in enumerate(batches):
        rows = functional.embedding(tokens.clamp_min(0), table).to(dtype)
        states[index] = rows * torch.tensor(config.embedding_scale, dtype=dtype)
    return states


def layers(
    checkpoint: Checkpoint, config: ModelConfig, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[int, int, Weights]]:
    """(slot, layer number, weights), one after another; drop one before taking the next."""
    for slot, entry in enumerate(config.layers):
        weights = load_layer(checkpoint, config, entry.layer)
        yield slot, entry.layer, {role: tensor.to(dtype) for role, tensor in weights.items()}


def step(
    config: ModelConfig, slot: int, weights: Weights, x: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Boundary slot -> boundary slot + 1 of whole sequences: x (B, T, D), tokens (B, T)."""
    padding = (tokens < 0).sum(dim=1, keepdim=True)
    positions = (torch.arange(tokens.shape[1]) - padding).clamp_min(-1)
    entry = config.layers[slot]
    alone = config.keep([entry.layer])
    cache = KVCache(alone, len(tokens), dtype=x.dtype, capacity=tokens.shape[1])
    rows = torch.arange(len(tokens))
    return run_layer(config, entry, weights, x, Angles(alone, positions), cache, 0, rows)
