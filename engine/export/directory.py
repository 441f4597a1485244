"""What the exported directories share: how they are begun, numbered, described and finished.

A directory `out` is written beside, as `out`.partial, and renamed when it is whole. A run that was
interrupted finds its finished files again; another model or other settings begin anew.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine import scratch
from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, model_type
from engine.checkpoint import safetensors
from engine.checkpoint.adapter import stamps
from engine.checkpoint.files import TOKENIZER_FILES
from engine.checkpoint.safetensors import SafetensorsFile
from engine.checkpoint.weights import Stored, values
from engine.errors import InputError
from engine.kernels.dtypes import name_of
from engine.scratch import Scratch, check_new, write_text
from engine.text import load_text
from engine.text.load import tokenizer_path

SHARD_BYTES = 5_000_000_000
# Rules that count layers from 0 would mean other layers after a cut; they become explicit lists.
_RULES = ("sliding_window_pattern", "max_window_layers", "no_rope_layer_interval")
_T = TypeVar("_T")


def begin(
    out: Path, source: Path, config: ModelConfig, described: Mapping[str, Any], also: str = ""
) -> Path:
    """`out`.partial with `described` as its config.json and the tokenizer of `source`.

    It is taken up again where an earlier run had the same source, layers and description, and
    whatever `also` tells.
    InputError where `out` exists, where what lies beside it is not of such a run, where another
    run writes there and where nothing can be written.
    """
    text = json.dumps(described, indent=2, sort_keys=True)
    partial = begin_empty(out, source, config, text + also)
    write_text(partial / "config.json", text)
    copy_tokenizer(source, partial)
    return partial


def begin_empty(out: Path, source: Path, config: ModelConfig, described: str) -> Path:
    """The same without a file in it but the note of what the run is."""
    check_new(out)
    partial = scratch.partial_of(out)
    layers = [entry.layer for entry in config.layers]
    key = {"source": stamps(source), "layers": layers, "config": described}
    Scratch(partial, json.dumps(key))
    return partial


def finish(partial: Path, out: Path) -> None:
    Scratch.held(partial).become(out)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    safetensors.save_tensors(path, tensors, metadata or {"format": "pt"})


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer's files as they are, or written anew from the metadata of a GGUF."""
    source = tokenizer_path(source)
    if not source.is_dir():
        with scratch.write_errors(out):
            load_text(source).to_transformers().save_pretrained(out)
        return
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            scratch.copy(source / name, out / name)


def shard_name(index: int, count: int) -> str:
    if count == 1:
        return "model.safetensors"
    return f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def index_shards(directory: Path, names: Sequence[str]) -> None:
    """The index of finished shards, from their headers; none is needed for a single one."""
    if len(names) == 1:
        return
    files = {name: SafetensorsFile(directory / name).entries for name in names}
    total = sum(entry.nbytes for entries in files.values() for entry in entries.values())
    shards = {tensor: name for name in files for tensor in files[name]}
    index = {"metadata": {"total_size": total}, "weight_map": shards}
    text = json.dumps(index, indent=2, sort_keys=True)
    write_text(directory / "model.safetensors.index.json", text)


def cut_shards(sizes: Mapping[_T, int], limit_bytes: int) -> list[list[_T]]:
    """Tensors in order, by their bytes: a new shard where the limit would be passed."""
    shards: list[list[_T]] = [[]]
    filled = 0
    for tensor, size in sizes.items():
        if shards[-1] and filled + size > limit_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    return shards


def plain(stored: Stored, dtype: torch.dtype | None, where: str) -> torch.Tensor:
    """A tensor in `dtype` (None: its own); InputError for what does not fit that."""
    if not isinstance(stored, torch.Tensor):
        stored = values(stored)
    tensor = stored if dtype is None else stored.to(dtype)
    if not bool(tensor.isfinite().all()):
        raise InputError(f"{where}: does not fit {tensor.dtype}")
    return tensor.contiguous()


# Names code of the directory, or kernels of the hub, for transformers to load.
_CODE = ("auto_map", "attn_implementation", "_attn_implementation", "experts_implementation")


def sliced_config(config: ModelConfig, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The Hugging Face config of the kept layers: every per-layer list sliced, no counting rule.

    Lists of the source with one entry a layer are sliced; what a rule implied (Gemma's window
    pattern, Qwen's first windowed layer, SmolLM3's NoPE interval) is written out layer by layer.
    How the source was quantized is left out.
    """
    kept = [entry.layer for entry in config.layers]
    if config.source.get("num_kv_shared_layers"):
        raise InputError(
            "num_kv_shared_layers: layers that share their keys and values cannot be cut"
        )
    left_out = (*_RULES, *_CODE, "quantization_config")
    raw = {key: value for key, value in config.source.items() if key not in left_out}
    for key, value in raw.items():
        tokens = key.endswith(("_id", "_ids", "_tokens"))
        if key != "architectures" and not tokens and isinstance(value, list):
            if len(value) == config.total_layers:
                raw[key] = [value[layer] for layer in kept]
    raw["model_type"] = model_type(config.family)  # some leave out this, or what follows
    raw["architectures"] = config.source.get("architectures") or [config.architecture]
    raw["num_hidden_layers"] = len(kept)
    if FAMILIES[config.family].windows == "types":
        raw["layer_types"] = [
            "full_attention" if entry.window is None else "sliding_attention"
            for entry in config.layers
        ]
    if config.family == "smollm3":
        raw["no_rope_layers"] = [int(entry.rope is not None) for entry in config.layers]
    if dtype is not None:
        raw.pop("torch_dtype", None)
        raw["dtype"] = name_of(dtype)
    return raw
