"""A shallower directory of a quantized one: its tensors copied by name, layers renumbered.

Nothing is computed: codes, scales and whatever lies beside them keep their bytes, so that what
opened the directory opens the shallower one.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.files import read_json
from engine.checkpoint.safetensors import SafetensorsCheckpoint
from engine.errors import InputError
from engine.export import directory
from engine.export.packed import PLAN, cut_plan
from engine.scratch import copy

BESIDE = ("quantize_config.json", "quant_config.json")
_LAYER = re.compile(r"(model\.layers\.)(\d{1,6})(\..*|$)", re.ASCII | re.DOTALL)
_REPEATS_REPEATS = re.compile(r"[*+?}|][^()]*\)[*+{]")  # (a+)+, (a|b)*
_NUMBER = re.compile(r"\d|\\d")  # without one, a pattern means the same of every layer


def prune(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    *,
    shard_bytes: int = directory.SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes the layers that `config` keeps to the new directory `out`, byte for byte.

    Lists with an entry a layer are cut to length, in config.json and in what it says of
    quantization. Written beside, taken up again and renamed as in `engine.export.hf`.
    """
    out = Path(out)
    stored = SafetensorsCheckpoint(checkpoint.path)
    slots = {entry.layer: slot for slot, entry in enumerate(config.layers)}
    names = {name: new for name in stored.names() if (new := renumbered(name, slots)) is not None}
    shards = directory.cut_shards({name: stored.nbytes(name) for name in names}, shard_bytes)
    described = directory.sliced_config(config)
    if (said := config.source.get("quantization_config")) is not None:
        described["quantization_config"] = cut(said, slots, names)
    renewed = _renewed(checkpoint.path, slots, names)
    partial = directory.begin(out, checkpoint.path, config, described)
    metadata = {
        new: text
        for key, text in stored.metadata.items()
        if (new := renumbered(key, slots)) is not None
    }
    files = [directory.shard_name(index, len(shards)) for index in range(len(shards))]
    for index, (file, shard) in enumerate(zip(files, shards, strict=True)):
        if not (partial / file).exists():
            tensors = {names[name]: stored.read(name) for name in shard}
            said = {key: text for key, text in metadata.items() if _of(key, tensors)}
            directory.save_tensors(partial / file, tensors, said or None)
        if progress is not None:
            progress(index + 1, len(shards))
    directory.index_shards(partial, files)
    for name in BESIDE:
        if name in renewed:
            directory.write_text(partial / name, renewed[name])
        elif (checkpoint.path / name).is_file():
            copy(checkpoint.path / name, partial / name)
    if (checkpoint.path / PLAN).is_file():
        cut_plan(checkpoint.path / PLAN, config).save(partial / PLAN)
    directory.finish(partial, out)


def renumbered(name: str, slots: Mapping[int, int]) -> str | None:
    """A tensor's or a module's name in the shallower model; None where its layer is gone."""
    match = _LAYER.match(name)
    if match is None:
        return name
    slot = slots.get(int(match[2]))
    return None if slot is None else f"{match[1]}{slot}{match[3]}"


def cut(said: Any, slots: Mapping[int, int], names: Mapping[str, str]) -> Any:
    """`quantization_config` with the modules that it names renumbered.

    A pattern ("re:...") that would mean other modules then becomes the names of what it means.
    """
    if isinstance(said, dict):
        for key in said:
            if not _LAYER.match(key) and _moves(key.removeprefix("+:").removeprefix("-:"), names):
                raise InputError(
                    f"quantization_config: expected rules for all layers or for modules by name, "
                    f"found {key!r:.200}; `engine export --to hf` writes a directory without it"
                )
        keys = {key: renumbered(key, slots) for key in said}
        return {new: cut(said[key], slots, names) for key, new in keys.items() if new is not None}
    if not isinstance(said, list):
        return said
    found: list[Any] = []
    for value in said:
        if not isinstance(value, str):
            found.append(cut(value, slots, names))
        elif value.startswith("re:") and _moves(value.removeprefix("re:"), names):
            meant = _pattern(value.removeprefix("re:"))
            found += [new for module, new in _modules(names).items() if meant.match(module)]
        elif (new := renumbered(value, slots)) is not None:
            found.append(new)
    return found


def _renewed(path: Path, slots: Mapping[int, int], names: Mapping[str, str]) -> dict[str, str]:
    """The files of BESIDE, which others read before config.json, that name modules by layer."""
    found = {}
    for name in BESIDE:
        said: dict[str, Any] = {}
        with suppress(InputError):  # absent, or nothing that anyone reads
            said = read_json(path / name)
        if (new := cut(said, slots, names)) != said:
            found[name] = json.dumps(new, indent=2)
    return found


def _modules(names: Mapping[str, str]) -> dict[str, str]:
    return {name.rpartition(".")[0]: new.rpartition(".")[0] for name, new in names.items()}


def _moves(pattern: str, names: Mapping[str, str]) -> bool:
    """Whether it means other modules once they are renumbered."""
    if _NUMBER.search(pattern) is None:
        return False
    meant, modules = _pattern(pattern), _modules(names).items()
    return any(bool(meant.match(old)) != bool(meant.match(new)) for old, new in modules)


def _pattern(value: str) -> re.Pattern[str]:
    if len(value) > 1000 or _REPEATS_REPEATS.search(value):
        raise InputError(
            "quantization_config: expected a pattern behind 're:' that does not repeat a choice or "
            f"what repeats, which may take for ever, found {value!r:.200}"
        )
    try:
        return re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(
            f"quantization_config: expected a pattern behind 're:', found {value!r:.200} ({error})"
        ) from error


def _of(key: str, tensors: Collection[str]) -> bool:
    """Whether a file's metadata speaks of one of its tensors, or of none at all."""
    name = key.removesuffix(".source")
    return not name.startswith("model.") or any(
        tensor == name or tensor.startswith(f"{name}.") for tensor in tensors
    )
