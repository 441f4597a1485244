"""The packed directory: config, tokenizer, plan, and a safetensors file for every layer.

A matrix lies under its Hugging Face name as kernels/w4/store.py writes it, never fused. Layers are
numbered from 0; `plan.json` says which of the original's they are. The metadata entry NAME.source
says what a tensor was before.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.artifacts import Plan
from engine.checkpoint.adapter import stamps
from engine.checkpoint.files import read_json
from engine.checkpoint.safetensors import SafetensorsFile, save_tensors
from engine.checkpoint.weights import describe
from engine.errors import InputError
from engine.export.directory import index_shards
from engine.kernels.w4 import store
from engine.kernels.w4.format import Packed
from engine.scratch import Scratch, check_new, copy, partial_of, write_text

PLAN = "plan.json"
_SOURCE = ".source"
_KIND = re.compile(r"(\w+(?:\.bias)?)(?:\.weight)?$")


@dataclass(frozen=True)
class Entry:
    """Kinds of tensors that fared alike, such as q_proj and k_proj.

    `in_layers`: quantized matrices of layers, which a head in the same bits does not join.
    """

    kinds: tuple[str, ...]
    source: str
    stored: str
    in_layers: bool
    count: int
    weights: int
    nbytes: int


def is_packed(config: ModelConfig) -> bool:
    """Whether it was read from a packed directory."""
    quantization = config.source.get("quantization_config") or {}
    return quantization.get("quant_method") == store.METHOD


def cut_plan(path: Path, config: ModelConfig) -> Plan:
    """The plan of a packed directory, of the layers that `config` keeps of it."""
    plan = Plan.load(path)
    if len(plan.keep) != config.total_layers:
        raise InputError(
            f"{path}: expected a plan that keeps {config.total_layers} layers, found "
            f"{len(plan.keep)}"
        )
    keep = tuple(plan.keep[entry.layer] for entry in config.layers)
    if keep == plan.keep:
        return plan
    # What it says of rule, score and text holds for its own layers alone.
    return replace(
        plan, keep=keep, rule="manual", note="", score=None, protect=(), profile=None,
        text_hash=None,
    )  # fmt: skip


def write_shard(
    path: Path, tensors: Mapping[str, Packed | torch.Tensor], sources: Mapping[str, str]
) -> None:
    """One safetensors file; `sources` says what each tensor was."""
    parts: dict[str, torch.Tensor] = {}
    metadata = {"format": "pt"}
    for name, stored in tensors.items():
        metadata[name + _SOURCE] = sources[name]
        if isinstance(stored, Packed):
            parts |= store.to_tensors(name, stored)
            metadata |= store.to_metadata(name, stored)
        else:
            parts[name] = stored
    save_tensors(path, parts, metadata)


def read_shard(path: Path) -> dict[str, Packed | torch.Tensor]:
    """The tensors that `write_shard` was given, mapped."""
    file = SafetensorsFile(path)
    return {name: _stored(file, name) for name in _names(file)}


def rewrite(
    source: Path, out: Path, changed: Mapping[str, Packed], beside: Mapping[str, str]
) -> None:
    """The packed directory `source` as `out`, with `changed` in the place of matrices of the same
    names and specs, and the text files `beside` by name; written beside and renamed."""
    check_new(out)
    partial = Scratch(partial_of(out), json.dumps(stamps(source)))
    for file in sorted(source.iterdir()):
        if file.suffix == ".safetensors":
            tensors, said = read_shard(file), SafetensorsFile(file).metadata
            sources = {name: said.get(name + _SOURCE, "") for name in tensors}
            new = {name: changed.get(name, tensor) for name, tensor in tensors.items()}
            write_shard(partial.path / file.name, new, sources)
        elif file.is_file():
            copy(file, partial.path / file.name)
    _renew(partial.path)
    for name, text in beside.items():
        write_text(partial.path / name, text)
    partial.become(out)


def _renew(directory: Path) -> None:
    """config.json and the index of shards that have just been written, where they were made for an
    earlier version, whose matrices had other parts."""
    config = read_json(directory / "config.json")
    said = config["quantization_config"]
    if said.get("version", store.VERSION) == store.VERSION:
        return
    said["version"] = store.VERSION
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")
    index_shards(directory, sorted(file.name for file in directory.glob("*.safetensors")))


def summary(shards: Sequence[Path]) -> list[Entry]:
    """What a packed directory holds and what that was made from."""
    found: dict[tuple[str, str, bool], Entry] = {}
    for file in map(SafetensorsFile, shards):
        for name in _names(file):
            stored, source = _stored(file, name), file.metadata.get(name + _SOURCE, "")
            kind = match[1] if (match := _KIND.search(name)) else name
            in_layers = isinstance(stored, Packed) and name.startswith("model.layers.")
            key = source, describe(stored), in_layers
            entry = found.get(key, Entry((), *key, 0, 0, 0))
            found[key] = replace(
                entry,
                kinds=tuple(dict.fromkeys((*entry.kinds, kind))),
                count=entry.count + 1,
                weights=entry.weights + torch.Size(stored.shape).numel(),
                nbytes=entry.nbytes + stored.nbytes,
            )
    return list(found.values())


def _names(file: SafetensorsFile) -> list[str]:
    """Those that `read_shard` gives: whatever the file holds, said where it comes from or not."""
    packed = {
        name
        for name in file.metadata
        if f"{name}.codes" in file.entries or f"{name}.tiles" in file.entries
    }
    return sorted(packed | {name for name in file.entries if name.rpartition(".")[0] not in packed})


def _stored(file: SafetensorsFile, name: str) -> Packed | torch.Tensor:
    described = file.metadata.get(name)
    if described is None:
        return file.read(name)
    version = 1 if f"{name}.codes" in file.entries else store.VERSION
    return store.from_tensors(name, file.read, described, version)
