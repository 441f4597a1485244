"""From text to a Profile: the angular distance across every block of layers, in one pass."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from engine.architecture.config import ModelConfig
from engine.artifacts import Artifact, Profile
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import lineage_hash
from engine.errors import InputError, NotFiniteError
from engine.kernels.angular.accumulate import AngularAccumulator
from engine.reference.decoder import Decoder
from engine.reference.stream import (
    DEFAULT_LIMIT_BYTES,
    begin_anew,
    is_whole,
    pad_batches,
    storage,
    stream,
)
from engine.text.samples import hash_samples

SAVE_SECONDS = 10.0  # between two notes of how far a run is
ACTIVATION_BYTES = 128_000_000  # of a batch in a streamed run: four (tokens, F) at their widest
_CHUNK = 256  # vectors handed to the accumulator at once in a streamed run

Progress = Callable[[int, int], None]  # (samples or layers done, in all)


@dataclass(frozen=True)
class Source:
    """What is profiled and on what; two parts join only where all of it but `shard` agrees."""

    model: str
    architecture: str
    lineage: str
    total_layers: int
    layers: tuple[int, ...]
    tokens: str  # "last" | "all"
    length: int
    bos: bool
    text_hash: str
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if len(self.shard) != 2 or not 0 <= self.shard[0] < self.shard[1]:
            found = "/".join(map(str, self.shard))
            raise InputError(f"shard: expected i/n with 0 <= i < n, found {found}")


@dataclass(frozen=True)
class ProfilePart(Artifact):
    """The exact sums of some of the samples: a shard, or a run that was interrupted."""

    kind: ClassVar[str] = "profile-part"

    source: Source
    state: dict[str, Any]  # of the accumulator
    done: int  # samples
    tokens_used: int

    def __post_init__(self) -> None:
        if (least := min(self.done, self.tokens_used)) < 0:
            raise ValueError(f"done, tokens_used: expected at least 0, found {least}")

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Self:
        """InputError too for sums that are no profile's."""
        part = super().from_json(raw, where)
        try:
            if part.state:
                part._check_state()
        except (ValueError, TypeError, ArithmeticError, RuntimeError) as error:
            raise InputError(f"{where}: profile-part: state: {error}") from error
        return part

    def _check_state(self) -> None:
        _profile(self.source, AngularAccumulator.from_state(self.state), [self])
        counts = [self.state[name] for name in ("samples", "weight", "weight_square")]
        if {*counts} != {counts[0]} or not 0 < counts[0] <= self.tokens_used:
            raise ValueError(f"expected one count from 1 to {self.tokens_used}, found {counts}")


def describe(
    name: str,
    checkpoint: Checkpoint,
    config: ModelConfig,
    samples: Sequence[Sequence[int]],
    tokens: str = "last",
    bos: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Source:
    """The Source of a run over all `samples` (of every shard)."""
    if tokens not in ("last", "all"):
        raise InputError(f"tokens: expected 'last' or 'all', found {tokens!r}")
    if not samples or not all(samples):
        raise InputError("text: there is no sample with at least one token")
    if tokens == "all" and all(len(sample) <= bos for sample in samples):
        raise InputError("text: every sample is BOS alone; there is no token to average over")
    text_hash = hash_samples(samples, config.max_context)
    return Source(
        model=name,
        architecture=config.architecture_hash,
        lineage=lineage_hash(checkpoint, config),
        total_layers=config.total_layers,
        layers=tuple(entry.layer for entry in config.layers),
        tokens=tokens,
        length=max(map(len, samples)),
        bos=bos,
        text_hash=text_hash,
        shard=shard,
    )


def own_samples(samples: Sequence[Sequence[int]], shard: tuple[int, int]) -> list[Sequence[int]]:
    """Every n-th sample from the i-th on: shard (i, n)."""
    index, count = shard
    return list(samples[index::count])


def measure(
    decoder: Decoder,
    samples: Sequence[Sequence[int]],
    source: Source,
    *,
    batch_tokens: int = 2048,
    backend: str | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> ProfilePart:
    """Runs the shard's samples through a decoder in memory, tapping every boundary.

    Sums are noted in the file `resume` as they grow; a run that finds it there goes on from it.
    """
    mine = own_samples(samples, source.shard)
    part = _resumed(resume, source)
    sums = AngularAccumulator.from_state(part.state, backend)
    saved = time.monotonic()
    every = source.tokens == "all"
    for tokens in pad_batches(mine[part.done :], batch_tokens, decoder.config):
        chosen = wanted(tokens, source)
        taken: list[torch.Tensor] = []

        def keep(_: int, x: torch.Tensor, chosen=chosen, taken=taken) -> None:
            # Most tokens: no copy, the weights leave out the others.
            taken.append(x.flatten(0, 1) if every else x[chosen.to(x.device)])

        if bool(chosen.any()):
            cache = decoder.new_cache(*tokens.shape)
            decoder.forward(tokens.to(decoder.device), cache, tap=keep)
            _update(sums, taken, part.done, chosen.flatten() if every else None)
        used = part.tokens_used + int((tokens >= 0).sum())
        part = replace(part, state=sums.to_state(), done=part.done + len(tokens), tokens_used=used)
        if resume is not None and time.monotonic() - saved > SAVE_SECONDS:
            part.save(resume)
            saved = time.monotonic()
        if progress is not None:
            progress(part.done, len(mine))
    return part


def measure_streamed(
    checkpoint: Checkpoint,
    config: ModelConfig,
    samples: Sequence[Sequence[int]],
    source: Source,
    *,
    batch_tokens: int | None = None,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> ProfilePart:
    """The same with one layer's weights in memory at a time.

    Hidden states and tapped vectors live in `directory`, from which a killed run is taken up, or
    where there is none in memory up to `limit_bytes` each, and in an unnamed file beyond it.
    Beside the layer and these, a batch's activations take about ACTIVATION_BYTES, unless a single
    sample takes more.
    """
    if batch_tokens is None:
        widest = max(config.ffn_size, config.heads * config.head_dim)
        batch_tokens = max(1, ACTIVATION_BYTES // (4 * widest * dtype.itemsize))
    mine = own_samples(samples, source.shard)
    batches = list(pad_batches(mine, batch_tokens, config))
    chosen = [wanted(tokens, source) for tokens in batches]
    counts = [int(mask.sum()) for mask in chosen]
    boundaries, total = len(config.layers) + 1, sum(counts)
    size, path = boundaries * total * config.hidden_size, None
    if directory is not None:
        path = directory / "vectors"
        if not is_whole(path, size, dtype):
            begin_anew(directory)
    flat = storage(size, dtype, limit_bytes, path)
    vectors = flat.view(boundaries, total, config.hidden_size)
    starts = [sum(counts[:index]) for index in range(len(counts))]

    def keep(boundary: int, batch: int, x: torch.Tensor) -> None:
        vectors[boundary, starts[batch] : starts[batch] + counts[batch]] = x[chosen[batch]]
        if progress is not None and batch == 0:
            progress(boundary, boundaries)

    stream(
        checkpoint, config, batches, keep,
        dtype=dtype, limit_bytes=limit_bytes, directory=directory,
    )  # fmt: skip
    sums = AngularAccumulator(backend)
    for start in range(0, total, _CHUNK):
        _update(sums, list(vectors[:, start : start + _CHUNK]), start)
    used = sum(int((tokens >= 0).sum()) for tokens in batches)
    return ProfilePart(source, sums.to_state(), len(mine), used)


def wanted(tokens: torch.Tensor, source: Source) -> torch.Tensor:
    """(B, T) bool: the last token of each sample, or every one but BOS and padding."""
    if source.tokens == "last":
        last = torch.zeros_like(tokens, dtype=torch.bool)
        last[:, -1] = True
        return last
    real = tokens >= 0
    first = real & ~torch.cat((torch.zeros_like(real[:, :1]), real[:, :-1]), dim=1)
    return real & ~first if source.bos else real


def merge(parts: Sequence[ProfilePart]) -> Profile:
    """One Profile from all shards of a run; InputError when one is missing, double or foreign."""
    if not parts:
        raise InputError("merge: expected at least one part, found none")
    if not any(part.state for part in parts):
        raise InputError("merge: the parts hold no samples")
    source = parts[0].source
    sums = AngularAccumulator()
    for part in parts:
        # A model lies elsewhere on other machines; its copies in other bits have other names.
        named = source.model if Path(part.source.model).name == Path(source.model).name else ""
        if replace(part.source, shard=source.shard, model=named or part.source.model) != source:
            raise InputError("merge: the parts come from different models, texts or settings")
        sums.merge(AngularAccumulator.from_state(part.state))
    count = source.shard[1]
    shards = sorted(part.source.shard for part in parts)
    if len(parts) != count or shards != [(index, count) for index in range(count)]:
        found = [index for index, _ in shards]
        raise InputError(f"merge: expected the shards 0 to {count - 1}, found {found}")
    return _profile(source, sums, parts)


def _profile(source: Source, sums: AngularAccumulator, parts: Sequence[ProfilePart]) -> Profile:
    result = sums.result()
    if not all(row.isfinite().all() for row in (*result.distances, result.magnitude)):
        raise NotFiniteError(f"{source.model}: computes hidden states that are not finite numbers")
    errors = [row.nan_to_num(0.0) for row in result.standard_errors]  # of a single sample: none
    return Profile(
        model=source.model,
        architecture=source.architecture,
        lineage=source.lineage,
        total_layers=source.total_layers,
        layers=source.layers,
        distances=tuple(tuple(row.tolist()) for row in result.distances),
        standard_errors=tuple(tuple(row.tolist()) for row in errors),
        influence=tuple(result.influence.tolist()),
        magnitude=tuple(result.magnitude.tolist()),
        metric="angular",
        tokens=source.tokens,
        samples=sum(part.done for part in parts),
        vectors=result.samples,
        tokens_used=sum(part.tokens_used for part in parts),
        length=source.length,
        bos=source.bos,
        text_hash=source.text_hash,
    )


def _resumed(path: Path | None, source: Source) -> ProfilePart:
    """The noted part of the same run, or an empty one."""
    if path is not None and path.is_file():
        part = ProfilePart.load(path)
        if part.source == source:
            return part
    return ProfilePart(source, {}, 0, 0)


def _update(
    sums: AngularAccumulator,
    boundaries: list[torch.Tensor],
    first: int,
    weights: torch.Tensor | None = None,
) -> None:
    try:
        sums.update(boundaries, weights)
    except ValueError as error:
        raise NotFiniteError(f"samples from {first} on: {error}") from error
