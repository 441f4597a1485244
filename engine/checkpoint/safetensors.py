"""Hugging Face directories: config.json and safetensors, one file or shards under an index.

File layout: a little-endian uint64, that many bytes of JSON ({name: {dtype, shape,
data_offsets}}), then the data, which the tensors cover without gaps.
"""

import json
import math
import mmap
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from engine.architecture.hf_config import from_hf
from engine.checkpoint.files import (
    ask_for_huge_pages,
    forget,
    map_file,
    parse_json,
    read_json,
    view,
)
from engine.errors import InputError
from engine.kernels.dtypes import dtype_of, name_of
from engine.scratch import replacing

if TYPE_CHECKING:
    import torch

# As the header spells it -> torch's name, bytes a value.
TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
ALIGN_BYTES = 64
_MAX_DIMENSIONS = 8
_MAX_SIZE = 2**63
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `offset` counts bytes from the start of the file."""

    dtype: str  # torch's name
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsFile:
    """One mapped file; `entries` lists its tensors, `metadata` is what its writer added."""

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = map_file(path)
        ask_for_huge_pages(mapped)
        header, start = _header(path, mapped)
        metadata = header.pop("__metadata__", None)
        self.metadata = metadata if isinstance(metadata, dict) else {}
        self.entries = {
            name: _entry(f"{path}: tensor {name!r}", fields, start, len(mapped))
            for name, fields in header.items()
        }
        _check_cover(path, self.entries, start, len(mapped))
        self._mapped = mapped

    def read(self, name: str) -> "torch.Tensor":
        """A view of the mapping in the stored dtype."""
        entry = self.entries[name]
        return view(self._data, entry.offset, dtype_of(entry.dtype), entry.shape)

    def forget(self) -> None:
        forget(self._mapped)

    @cached_property
    def _data(self) -> "torch.Tensor":
        import torch

        return torch.frombuffer(self._mapped, dtype=torch.uint8)


class SafetensorsCheckpoint:
    """A Hugging Face directory's tensors as stored; a `Checkpoint` where none is quantized."""

    def __init__(self, path: Path) -> None:
        self.path = path
        source = _config(path)
        self._files = _open_files(path)
        self.config = from_hf(source, str(path))

    @property
    def metadata(self) -> dict[str, str]:
        """What the files' headers say besides their tensors, of all shards."""
        return {
            key: value
            for file in dict.fromkeys(self._files.values())
            for key, value in file.metadata.items()
        }

    def names(self) -> Collection[str]:
        return self._files.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._file(name).entries[name].shape

    def dtype(self, name: str) -> str:
        return self._file(name).entries[name].dtype

    def nbytes(self, name: str) -> int:
        return self._file(name).entries[name].nbytes

    def read(self, name: str) -> "torch.Tensor":
        return self._file(name).read(name)

    def packed(self, name: str) -> None:
        self._file(name)

    def spec(self, name: str) -> None:
        self._file(name)

    def forget(self) -> None:
        for file in set(self._files.values()):
            file.forget()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise InputError(f"{self.path}: there is no tensor {name!r}")
        return self._files[name]


def save_tensors(
    path: Path, tensors: "Mapping[str, torch.Tensor]", metadata: Mapping[str, str]
) -> None:
    """A file of this layout, written beside and renamed.

    Not by safetensors' own `save_file`, whose data begins anywhere: here tensors that fill cache
    lines, as tiles do (kernels/w4/tiled.py), lie on them, and others on multiples of an item.
    """
    import torch

    spelt = {name: spelling for spelling, (name, _) in TYPES.items()}
    whole = {name: tensor.nbytes % ALIGN_BYTES == 0 for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (not whole[name], -tensors[name].itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": spelt[name_of(tensor.dtype)],
            "shape": list(tensor.shape),
            "data_offsets": [at, at := at + tensor.nbytes],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN_BYTES)
    with replacing(path, at) as beside, open(beside, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            flat = tensors[name].detach().cpu().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)


def quantization_config(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json, or an older quantize_config.json, says of quantization; else None."""
    found = config.get("quantization_config")
    if found is None and (path / "quantize_config.json").is_file():
        found = {"quant_method": "gptq"} | read_json(path / "quantize_config.json")
    if found is None and (path / "quanto_qmap.json").is_file():
        found = {"quant_method": "quanto"}  # which optimum-quanto's directories do not say
    if found is None and (path / "hf_quant_config.json").is_file():
        said = read_json(path / "hf_quant_config.json").get("quantization")
        if isinstance(said, dict) and said.get("quant_algo"):  # else of keys and values alone
            found = {"quant_method": "modelopt"}
    if (said := config.get("quantization")) and found in (None, said):
        found = {"quant_method": "mlx"}  # whose keys are its own, one of them twice
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{path}: quantization_config must be an object, found {found!r}")
    return found


def _config(path: Path) -> dict:
    """config.json; the end tokens come from generation_config.json where there is one."""
    if not (path / "config.json").is_file():
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; to open a GGUF, name the file: {', '.join(ggufs)}" if ggufs else ""
        raise InputError(f"{path}: there is no config.json{hint}")
    config = read_json(path / "config.json")
    if "compression_config" in config:  # what compressed-tensors wrote until it was transformers'
        config.setdefault("quantization_config", config.pop("compression_config"))
    if (path / "generation_config.json").is_file():
        generation = read_json(path / "generation_config.json")
        if generation.get("eos_token_id") is not None:
            config["eos_token_id"] = generation["eos_token_id"]
    return config


def _open_files(path: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> the file that holds it.

    One whole file goes before an index, as for transformers, which leaves an index of shards that
    it has replaced.
    """
    named, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.is_file() and not named.is_file():
        return _open_shards(index)
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1 and named not in files:
        raise InputError(
            f"{path}: several safetensors files and no {index.name} that says which tensor is where"
        )
    if files:
        file = SafetensorsFile(named if named in files else files[0])
        return dict.fromkeys(file.entries, file)
    refuse_pickles(path)
    raise InputError(f"{path}: there is no safetensors file")


def refuse_pickles(path: Path) -> None:
    """InputError where a directory holds weights as pickles."""
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise InputError(
            f"{path}: weights as Python pickles ({pickles[0]}) are not read, because a pickle can "
            "run code; convert them to safetensors"
        )


def _open_shards(index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: expected an object 'weight_map' of tensor names")
    shards: dict[str, SafetensorsFile] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise InputError(f"{index}: tensor {name!r}: expected a file name, found {shard!r}")
        if shard not in shards:
            if not os.path.isfile(index.parent / shard):  # False for names that no file can have
                raise InputError(f"{index}: the shard {shard} is missing")
            shards[shard] = SafetensorsFile(index.parent / shard)
        if name not in shards[shard].entries:
            raise InputError(
                f"{index.parent / shard}: lacks tensor {name!r}, which the index names"
            )
    for shard, file in shards.items():
        for name in file.entries:
            if weight_map.get(name, shard) != shard:
                raise InputError(
                    f"{file.path}: holds tensor {name!r}, which the index says is in "
                    f"{weight_map[name]}"
                )
    return {name: shards[shard] for name, shard in weight_map.items()}


def _header(path: Path, mapped: mmap.mmap) -> tuple[dict, int]:
    """The header's JSON, and the byte at which the data starts."""
    if len(mapped) < 8:
        raise InputError(f"{path}: {len(mapped)} bytes are too few for a safetensors file")
    length = int.from_bytes(mapped[:8], "little")
    if length > min(len(mapped) - 8, _MAX_HEADER_BYTES):
        raise InputError(
            f"{path}: the header claims {length} bytes of a {len(mapped)}-byte file; it is "
            "truncated or not safetensors"
        )
    return parse_json(mapped[8 : 8 + length], f"{path}: header"), 8 + length


def _entry(where: str, fields: object, start: int, size: int) -> Entry:
    if not isinstance(fields, dict):
        raise InputError(f"{where}: expected an object, found {type(fields).__name__}")
    dtype, shape, span = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise InputError(f"{where}: dtype {dtype!r} is not supported; known are {', '.join(TYPES)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS:
        raise InputError(f"{where}: expected a shape of at most {_MAX_DIMENSIONS} sizes")
    if not _are_sizes(span) or len(span) != 2 or span[0] > span[1]:
        raise InputError(f"{where}: expected data_offsets [begin, end]")
    begin, end = span
    if start + end > size:
        raise InputError(
            f"{where}: its data ends at byte {start + end} of a {size}-byte file; it is truncated"
        )
    name, itemsize = TYPES[dtype]
    entry = Entry(name, tuple(shape), start + begin, math.prod(shape) * itemsize)
    if entry.nbytes != end - begin:
        raise InputError(
            f"{where}: {dtype} {shape} takes {entry.nbytes} bytes, but its offsets span "
            f"{end - begin}"
        )
    return entry


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        type(item) is int and 0 <= item < _MAX_SIZE for item in value
    )


def _check_cover(path: Path, entries: dict[str, Entry], start: int, size: int) -> None:
    """The format's rule: the tensors cover the data exactly, without overlaps or gaps."""
    at = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset != at:
            problem = "overlaps the tensor before it" if entry.offset < at else "follows a gap"
            raise InputError(f"{path}: tensor {name!r} {problem} at byte {entry.offset}")
        at += entry.nbytes
    if at != size:
        raise InputError(f"{path}: {size - at} bytes after the last tensor belong to none")
