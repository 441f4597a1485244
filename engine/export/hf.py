"""A shallower checkpoint as an ordinary Hugging Face directory, streamed a shard at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.artifacts import replacing
from engine.checkpoint import Checkpoint
from engine.config import ModelConfig
from engine.errors import InputError
from engine.families import layer_tensors, outer_tensors
from engine.text import load_text

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
SHARD_BYTES = 5_000_000_000
# Rules that count layers from 0 would mean other layers after a cut; they become explicit lists.
_RULES = ("sliding_window_pattern", "max_window_layers", "no_rope_layer_interval")
_WINDOWED = ("qwen2", "qwen3", "gemma2", "gemma3", "smollm3")


@dataclass(frozen=True)
class Item:
    """One tensor on its way: its name in the source, its name in the result, its shape."""

    source: str
    name: str
    shape: tuple[int, ...]


def prune(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the layers that `config` keeps to the new directory `out`, renumbered from 0.

    `dtype` is 16-bit by default: the source's own, else float16. Shards are written beside, in
    `out` + ".partial", and found again after an interruption; the directory is renamed at the
    end. `progress` is called with bytes done and in all.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already; name a new directory")
    dtype = dtype or _stored_dtype(checkpoint, config)
    shards = plan_shards(list(items(config)), dtype, shard_bytes)
    partial = out.with_name(out.name + ".partial")
    pruned = json.dumps(pruned_config(config, dtype), indent=2, sort_keys=True)
    _start(partial, pruned)
    copy_tokenizer(checkpoint.path, partial)
    total = sum(_nbytes(item, dtype) for shard in shards for item in shard)
    done = 0
    for index, shard in enumerate(shards):
        path = partial / _shard_name(index, len(shards))
        if not path.exists():
            _write_shard(checkpoint, shard, dtype, path)
        done += sum(_nbytes(item, dtype) for item in shard)
        if progress is not None:
            progress(done, total)
    if len(shards) > 1:
        _write_index(partial, shards, total)
    partial.replace(out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's files as they are, or written anew from the metadata of a GGUF."""
    if not source.is_dir():
        load_text(source).to_transformers().save_pretrained(out)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            with replacing(out / name) as beside:
                shutil.copyfile(source / name, beside)


def items(config: ModelConfig) -> Iterator[Item]:
    """Every tensor of the shallower model, layers renumbered by slot."""
    for name, shape in outer_tensors(config).values():
        yield Item(name, name, shape)
    for slot, entry in enumerate(config.layers):
        sources = layer_tensors(config, entry.layer)
        for role, (name, shape) in layer_tensors(config, slot).items():
            yield Item(sources[role][0], name, shape)


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


def pruned_config(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The Hugging Face config of the kept layers: every per-layer list sliced, no counting rule.

    Lists of the source with one entry a layer are sliced; what a rule implied (Gemma's window
    pattern, Qwen's first windowed layer, SmolLM3's NoPE interval) is written out layer by layer.
    """
    kept = [entry.layer for entry in config.layers]
    if config.source.get("num_kv_shared_layers"):
        raise InputError(
            "num_kv_shared_layers: layers that share their keys and values cannot be cut"
        )
    raw = {key: value for key, value in config.source.items() if key not in _RULES}
    for key, value in raw.items():
        if key not in ("architectures", "eos_token_id") and isinstance(value, list):
            if len(value) == config.total_layers:
                raw[key] = [value[layer] for layer in kept]
    raw["num_hidden_layers"] = len(kept)
    if config.family in _WINDOWED:
        raw["layer_types"] = [
            "full_attention" if entry.window is None else "sliding_attention"
            for entry in config.layers
        ]
    if config.family == "smollm3":
        raw["no_rope_layers"] = [int(entry.rope is not None) for entry in config.layers]
    if dtype is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = str(dtype).removeprefix("torch.")
    return raw


def _stored_dtype(checkpoint: Checkpoint, config: ModelConfig) -> torch.dtype:
    stored = checkpoint.read(outer_tensors(config)["embedding"][0]).dtype
    return stored if stored in (torch.float16, torch.bfloat16) else torch.float16


def _nbytes(item: Item, dtype: torch.dtype) -> int:
    return torch.Size(item.shape).numel() * dtype.itemsize


def _shard_name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def _start(partial: Path, config: str) -> None:
    """An empty directory, or the one an interrupted run of the very same cut has left."""
    written = partial / "config.json"
    if partial.exists() and not (written.is_file() and written.read_text() == config):
        shutil.rmtree(partial)
    try:
        partial.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{partial}: {error.strerror}") from error
    with replacing(written) as beside:
        beside.write_text(config)


def _write_shard(checkpoint: Checkpoint, shard: list[Item], dtype: torch.dtype, path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for item in shard:
        found = tuple(checkpoint.shape(item.source))
        if found != item.shape:
            raise InputError(
                f"{checkpoint.path}: {item.source}: expected shape {item.shape}, found {found}"
            )
        tensor = checkpoint.read(item.source).to(dtype)
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{checkpoint.path}: {item.source}: does not fit {dtype}")
        tensors[item.name] = tensor.contiguous()
    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})


def _write_index(directory: Path, shards: list[list[Item]], total_bytes: int) -> None:
    weight_map = {
        item.name: _shard_name(index, len(shards))
        for index, shard in enumerate(shards)
        for item in shard
    }
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    with replacing(directory / "model.safetensors.index.json") as beside:
        beside.write_text(json.dumps(index, indent=2, sort_keys=True))
