"""A checkpoint one layer at a time: hidden states are carried along, weights come and go.

What a model needs in memory is then one layer and the hidden states of all samples, and those
live in files when they exceed a limit: a 70B model is profiled or quantized on a laptop. With a
working directory a run that was killed is taken up at the layer it had reached.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.nn import functional

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.files import read_json
from engine.checkpoint.weights import Weights, load_layer, load_tensor
from engine.errors import InputError
from engine.reference.cache import KVCache
from engine.reference.decoder import Angles, run_layer
from engine.scratch import allocate, write_text

DEFAULT_LIMIT_BYTES = 1 << 30
_NOTE = "progress.json"  # how far a run in a directory is

Visit = Callable[[int, int, torch.Tensor], None]  # (boundary, batch, hidden states (B, T, D))


def storage(
    size: int, dtype: torch.dtype, limit_bytes: int, path: Path | None = None
) -> torch.Tensor:
    """(size,) values in memory; in an unnamed file beyond the limit; in `path` where given.

    A file's pages are the system's to drop, so they do not count as the process's own memory.
    InputError where the disk has no room for it.
    """
    nbytes = size * dtype.itemsize
    if path is not None:
        allocate(path, nbytes)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
    if nbytes <= limit_bytes:
        return torch.empty(size, dtype=dtype)
    with tempfile.NamedTemporaryFile() as file:
        allocate(Path(file.name), nbytes)
        return torch.from_file(file.name, shared=True, size=size, dtype=dtype)


def marked(
    path: Path, count: int, **parts: tuple[torch.dtype, tuple[int, ...]]
) -> tuple[torch.Tensor, ...]:
    """Tensors in the files `path`.NAME, by dtype and shape, and in `path`.done the marks (count,)
    of what is whole in them: none where one of the files was not there, or of another size."""
    done, found = path.with_suffix(".done"), []
    if not all(
        is_whole(path.with_suffix(f".{name}"), math.prod(shape), dtype)
        for name, (dtype, shape) in parts.items()
    ):
        done.unlink(missing_ok=True)
    for name, (dtype, shape) in parts.items():
        found.append(storage(math.prod(shape), dtype, 0, path.with_suffix(f".{name}")).view(shape))
    return *found, storage(count, torch.uint8, 0, done)


def is_whole(path: Path, size: int, dtype: torch.dtype) -> bool:
    """Whether `storage` has made this file, and nothing has cut it short since."""
    return path.is_file() and path.stat().st_size == size * dtype.itemsize


def begin_anew(directory: Path) -> None:
    """What `stream` has done in a directory is not taken up."""
    (directory / _NOTE).unlink(missing_ok=True)


class HiddenStates:
    """The residual streams of all batches between two layers.

    With a directory there are two files, read and written in turn, and `advance` notes how far
    the run is: a kill in the middle of a layer loses that layer alone. `key` tells runs apart.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int, int]],
        dtype: torch.dtype,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        directory: Path | None = None,
        key: str = "",
    ) -> None:
        self._note = None if directory is None else directory / _NOTE
        self._key = key
        self.slot = self._noted()
        sizes = [math.prod(shape) for shape in shapes]
        paths = [None] if directory is None else [directory / f"hidden.{i}" for i in range(2)]
        if directory and not all(path and is_whole(path, sum(sizes), dtype) for path in paths):
            begin_anew(directory)
            self.slot = -1
        self._buffers = [
            [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
            for flat in (storage(sum(sizes), dtype, limit_bytes, path) for path in paths)
        ]

    def __getitem__(self, batch: int) -> torch.Tensor:
        """Boundary `slot` of a batch."""
        return self._buffers[self.slot % len(self._buffers)][batch]

    def put(self, batch: int, states: torch.Tensor) -> None:
        """Boundary `slot + 1` of a batch."""
        self._buffers[(self.slot + 1) % len(self._buffers)][batch].copy_(states)

    def advance(self) -> None:
        """All batches have been put."""
        self.slot += 1
        if self._note is not None:
            write_text(self._note, json.dumps({"key": self._key, "slot": self.slot}))

    def _noted(self) -> int:
        """Where an earlier run of the same key stands; -1: nothing has been put yet."""
        if self._note is None or not self._note.is_file():
            return -1
        noted = read_json(self._note)
        slot = noted.get("slot")
        if type(slot) is not int or slot < -1 or not isinstance(noted.get("key"), str):
            raise InputError(
                f"{self._note}: expected how far a run is, found something else; remove "
                f"{self._note.parent} to start over"
            )
        return slot if noted["key"] == self._key else -1


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
    last layer, before the final norm. A run taken up again shows them from the one it had reached.
    """
    states = open_states(checkpoint, config, batches, dtype, limit_bytes, directory)
    while states.slot < len(config.layers):
        slot = states.slot
        weights = load_layer(checkpoint, config, config.layers[slot].layer)
        for index, tokens in enumerate(batches):
            visit(slot, index, states[index])
            states.put(index, step(config, slot, weights, states[index], tokens))
        states.advance()
    for index in range(len(batches)):
        visit(len(config.layers), index, states[index])


def open_states(
    checkpoint: Checkpoint,
    config: ModelConfig,
    batches: Sequence[torch.Tensor],
    dtype: torch.dtype = torch.float32,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    directory: Path | None = None,
) -> HiddenStates:
    """Boundary 0 of every batch, or the boundary that an earlier run in `directory` had reached."""
    for tokens in batches:
        if (most := int(tokens.max())) >= config.vocab_size:
            raise InputError(f"tokens: expected ids below {config.vocab_size}, found {most}")
    digest = hashlib.sha256(repr((config.layers, dtype)).encode())
    for tokens in batches:  # by shape: the same text may be cut into samples of another length
        digest.update(repr(tokens.shape).encode() + tokens.numpy().tobytes())
    shapes = [(*tokens.shape, config.hidden_size) for tokens in batches]
    states = HiddenStates(shapes, dtype, limit_bytes, directory, digest.hexdigest())
    if states.slot < 0:
        table = load_tensor(checkpoint, config, None, "embedding")
        scale = torch.tensor(config.embedding_scale, dtype=dtype)
        for index, tokens in enumerate(batches):
            states.put(index, functional.embedding(tokens.clamp_min(0), table).to(dtype) * scale)
        states.advance()
    return states


def step(
    config: ModelConfig, slot: int, weights: Weights, x: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Boundary slot -> boundary slot + 1 of whole sequences: x (B, T, D), tokens (B, T)."""
    padding = (tokens < 0).sum(dim=1, keepdim=True)
    positions = (torch.arange(tokens.shape[1], device=tokens.device) - padding).clamp_min(-1)
    entry = config.layers[slot]
    alone = config.keep([entry.layer])
    cache = KVCache(alone, len(tokens), x.device, x.dtype, capacity=tokens.shape[1])
    rows = torch.arange(len(tokens), device=x.device)
    return run_layer(config, entry, weights, x, Angles(alone, positions), cache, 0, rows)


def pad_batches(
    samples: Sequence[Sequence[int]], batch_tokens: int, config: ModelConfig
) -> Iterator[torch.Tensor]:
    """Consecutive samples as (B, T) int64, left-padded with -1, at most `batch_tokens` each.

    Of one length where rotations depend on the longest of a batch: a sample's states are its own.
    """
    batch: list[Sequence[int]] = []
    for sample in samples:
        longest = max(len(sample), *(len(other) for other in batch), 1)
        unlike = config.whole_prefill and bool(batch) and len(sample) != len(batch[0])
        if batch and (unlike or longest * (len(batch) + 1) > batch_tokens):
            yield _pad(batch)
            batch = []
        batch.append(sample)
    if batch:
        yield _pad(batch)


def _pad(samples: Sequence[Sequence[int]]) -> torch.Tensor:
    width = max(len(sample) for sample in samples)
    return torch.tensor([[-1] * (width - len(sample)) + list(sample) for sample in samples])
