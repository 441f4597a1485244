"""A shallower checkpoint as an ordinary Hugging Face directory, streamed a shard at a time."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import load_tensor
from engine.errors import InputError
from engine.export import directory
from engine.export.tensors import Item, items

SHARD_BYTES = 5_000_000_000


def prune(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    beside: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the layers that `config` keeps to the new directory `out`, renumbered from 0.

    `dtype` is 16-bit by default: the source's own, else float16. Shards are written beside, in
    `out` + ".partial", and found again after an interruption; the directory is renamed at the
    end, `beside` in it as text files by name. `progress` is called with bytes done and in all.
    """
    out = Path(out)
    dtype = dtype or stored_dtype(checkpoint, config)
    shards = plan_shards(list(items(config)), dtype, shard_bytes)
    described = directory.sliced_config(config, dtype)
    partial = directory.begin(out, checkpoint.path, config, described)
    names = [directory.shard_name(index, len(shards)) for index in range(len(shards))]
    total = sum(_nbytes(item, dtype) for shard in shards for item in shard)
    done = 0
    for name, shard in zip(names, shards, strict=True):
        if not (partial / name).exists():
            _write_shard(checkpoint, shard, dtype, partial / name)
        done += sum(_nbytes(item, dtype) for item in shard)
        if progress is not None:
            progress(done, total)
    directory.index_shards(partial, names)
    for name, text in (beside or {}).items():
        directory.write_text(partial / name, text)
    directory.finish(partial, out)


def plan_shards(tensors: list[Item], dtype: torch.dtype, limit_bytes: int) -> list[list[Item]]:
    """Tensors in order, a new shard where the limit would be passed."""
    shards: list[list[Item]] = [[]]
    filled = 0
    for item in tensors:
        size = _nbytes(item, dtype)
        if shards[-1] and filled + size > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def stored_dtype(checkpoint: Checkpoint, config: ModelConfig) -> torch.dtype:
    """Its own 16-bit one; float16 where it is stored otherwise."""
    stored = checkpoint.read(outer_tensors(config)["embedding"][0]).dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def _nbytes(item: Item, dtype: torch.dtype) -> int:
    return torch.Size(item.shape).numel() * dtype.itemsize


def _write_shard(checkpoint: Checkpoint, shard: list[Item], dtype: torch.dtype, path: Path) -> None:
    tensors = {}
    for item in shard:
        tensor = load_tensor(checkpoint, checkpoint.config, item.layer, item.role).to(dtype)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{checkpoint.path}: {item.source}: does not fit {dtype}")
        tensors[item.name] = tensor.contiguous()
    directory.save_tensors(path, tensors)
