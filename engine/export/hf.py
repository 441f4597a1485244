"""A shallower checkpoint as an ordinary Hugging Face directory, streamed a shard at a time."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import half_dtype, load_tensor
from engine.export import directory
from engine.export.tensors import Item, items


def prune(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = directory.SHARD_BYTES,
    beside: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the layers that `config` keeps to the new directory `out`, renumbered from 0.

    `dtype` is 16-bit by default: the source's own (`half_dtype`). Shards are written beside, in
    `out` + ".partial", and found again after an interruption; the directory is renamed at the
    end, `beside` in it as text files by name. `progress` is called with bytes done and in all.
    """
    out = Path(out)
    dtype = dtype or half_dtype(checkpoint)
    sizes = {item: math.prod(item.shape) * dtype.itemsize for item in items(config)}
    shards = directory.cut_shards(sizes, shard_bytes)
    described = directory.sliced_config(config, dtype)
    partial = directory.begin(out, checkpoint.path, config, described)
    names = [directory.shard_name(index, len(shards)) for index in range(len(shards))]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        if not (partial / name).exists():
            _write_shard(checkpoint, shard, dtype, partial / name)
        done += sum(sizes[item] for item in shard)
        if progress is not None:
            progress(done, sum(sizes.values()))
    directory.index_shards(partial, names)
    for name, text in (beside or {}).items():
        directory.write_text(partial / name, text)
    directory.finish(partial, out)


def _write_shard(checkpoint: Checkpoint, shard: list[Item], dtype: torch.dtype, path: Path) -> None:
    tensors = {}
    for item in shard:
        stored = load_tensor(checkpoint, checkpoint.config, item.layer, item.role)
        tensors[item.name] = directory.plain(stored, dtype, f"{checkpoint.path}: {item.source}")
    directory.save_tensors(path, tensors)
