"""The GGUF container (versions 2 and 3, little-endian): metadata, and where each tensor lies.

Layout: "GGUF", version, tensor count, pair count; the metadata pairs; one record a tensor (name,
sizes innermost first, type, offset); padding to the alignment; the data. Nothing in the file is
believed before it is checked against the file's size, and no value is decoded before it is asked
for: a vocabulary is stepped over.
"""

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.files import forget, map_file
from engine.checkpoint.gguf_blocks import BLOCK_TYPES, BlockType, type_name
from engine.errors import InputError

if TYPE_CHECKING:
    import torch

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # ggml's GGML_MAX_DIMS
_LEAST_PAIR_BYTES = 13  # empty key, type, one byte
_LEAST_TENSOR_BYTES = 32  # empty name, dimension count, one size, type, offset
_length = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class GgufTensor:
    """`offset` counts bytes from the start of the file; `shape` has K last, as torch has it."""

    type: BlockType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.type.weights * self.type.nbytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class _Value:
    """Undecoded metadata: `count` items of type `kind` from byte `start`; None: one, not a list."""

    kind: int
    count: int | None
    start: int


class Metadata(Mapping[str, Any]):
    """Key -> int, float, bool, str or a list of them, decoded at the first look-up."""

    def __init__(self, path: Path, data: mmap.mmap, values: dict[str, _Value]) -> None:
        self._path, self._data, self._values = path, data, values
        self._decoded: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._decoded:
            try:
                self._decoded[key] = self._decode(self._values[key])
            except UnicodeDecodeError as error:
                raise InputError(f"{self._path}: metadata {key!r} is not UTF-8 text") from error
        return self._decoded[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def kind(self, key: str) -> tuple[int, int | None]:
        """GGUF's number for its type; for an array, 9 and that of its items."""
        value = self._values[key]
        return (value.kind, None) if value.count is None else (_ARRAY, value.kind)

    def count(self, key: str) -> int:
        """Items of an array, of which none is read; 0 where there is none."""
        found = self._values.get(key)
        return 0 if found is None else found.count or 0

    def _decode(self, value: _Value) -> Any:
        count = 1 if value.count is None else value.count
        if value.kind == _STRING:
            items = self._strings(value.start, count)
        else:
            layout = f"<{count}{_SCALARS[value.kind]}"
            items = list(struct.unpack_from(layout, self._data, value.start))
        return items[0] if value.count is None else items

    def _strings(self, at: int, count: int) -> list[str]:
        items = []
        for _ in range(count):
            start = at + 8
            at = start + _length(self._data, at)[0]
            items.append(self._data[start:at].decode())
        return items


class GgufFile:
    """A mapped GGUF: `data` is the whole file, (bytes,) uint8.

    Raises:
        InputError: not a GGUF, cut short, or with counts, lengths or offsets that lie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        mapped = map_file(path)
        header = _Header(path, mapped)
        tensor_count = header.start()
        self.metadata = Metadata(path, mapped, header.pairs())
        self.tensors = header.tensors(tensor_count, _alignment(path, self.metadata))
        self._mapped = mapped

    def floats(self, offset: int, count: int) -> tuple[float, ...]:
        """So many float32 values from byte `offset` on."""
        return struct.unpack_from(f"<{count}f", self._mapped, offset)

    @cached_property
    def data(self) -> "torch.Tensor":
        import torch

        return torch.frombuffer(self._mapped, dtype=torch.uint8)

    def forget(self) -> None:
        forget(self._mapped)


class _Header:
    """A position in the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def start(self) -> int:
        """Steps over the fixed part up to the pairs; the number of tensors."""
        if self._data[:4] != b"GGUF":
            raise InputError(f"{self._path}: not a GGUF file (it begins with {self._data[:4]!r})")
        self._skip(4, "the magic")
        version = self._number("<I", "the version")
        if version not in (2, 3):
            big = version and version & 0xFFFF == 0
            found = "a big-endian file" if big else f"version {version}"
            raise InputError(f"{self._path}: expected GGUF version 2 or 3, found {found}")
        return self._count("tensors", _LEAST_TENSOR_BYTES)

    def pairs(self) -> dict[str, _Value]:
        values = {}
        for _ in range(self._count("metadata pairs", _LEAST_PAIR_BYTES)):
            key = self._string("a metadata key")
            if key in values:
                raise InputError(f"{self._path}: metadata {key!r:.100} appears twice")
            values[key] = self._value(f"metadata {key!r:.100}")
        return values

    def tensors(self, count: int, alignment: int) -> dict[str, GgufTensor]:
        """Name -> tensor, its offset counted from the start of the file."""
        tensors: dict[str, GgufTensor] = {}
        for _ in range(count):
            name = self._string("a tensor name")
            if name in tensors:
                raise InputError(f"{self._path}: tensor {name!r:.100} appears twice")
            tensors[name] = self._tensor(f"tensor {name!r:.100}")
        base = -(-self._at // alignment) * alignment
        placed = {
            name: GgufTensor(tensor.type, tensor.shape, base + tensor.offset)
            for name, tensor in tensors.items()
        }
        self._check_places(placed, alignment)
        return placed

    def _tensor(self, what: str) -> GgufTensor:
        dimensions = self._number("<I", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise InputError(
                f"{self._path}: {what}: expected 1 to {_MAX_DIMENSIONS} dimensions, "
                f"found {dimensions}"
            )
        shape = tuple(self._number("<Q", what) for _ in range(dimensions))[::-1]
        kind = self._number("<I", what)
        if kind not in BLOCK_TYPES:
            known = ", ".join(block.name for block in BLOCK_TYPES.values())
            raise InputError(
                f"{self._path}: {what}: type {type_name(kind)} is not supported; known are {known}"
            )
        block = BLOCK_TYPES[kind]
        if 0 in shape or shape[-1] % block.weights:
            raise InputError(
                f"{self._path}: {what}: shape {shape} does not fit {block.name}, whose rows are "
                f"blocks of {block.weights}"
            )
        return GgufTensor(block, shape, self._number("<Q", what))

    def _check_places(self, tensors: dict[str, GgufTensor], alignment: int) -> None:
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
            where = f"{self._path}: tensor {name!r}"
            if tensor.offset % alignment:
                raise InputError(f"{where} at byte {tensor.offset} is not {alignment}-byte aligned")
            if tensor.offset < end:
                raise InputError(f"{where} overlaps the tensor before it at byte {tensor.offset}")
            end = tensor.offset + tensor.nbytes
            if end > len(self._data):
                raise InputError(
                    f"{where}: its data ends at byte {end} of a {len(self._data)}-byte file; "
                    "it is truncated"
                )

    def _value(self, what: str) -> _Value:
        kind, count = self._number("<I", what), None
        if kind == _ARRAY:
            kind = self._number("<I", what)
            least = 8 if kind == _STRING else struct.calcsize(_SCALARS.get(kind, "B"))
            count = self._count(f"items in {what}", least)
        items = 1 if count is None else count
        if kind == _STRING:
            return _Value(kind, count, self._skip_strings(items, what))
        if kind not in _SCALARS:
            raise InputError(f"{self._path}: {what}: value type {kind} is not supported")
        return _Value(kind, count, self._skip(items * struct.calcsize(_SCALARS[kind]), what))

    def _skip(self, nbytes: int, what: str) -> int:
        """Steps over bytes; the position before."""
        start = self._at
        if nbytes > len(self._data) - start:
            raise self._cut_short(what)
        self._at += nbytes
        return start

    def _skip_strings(self, count: int, what: str) -> int:
        start = at = self._at
        try:
            for _ in range(count):
                at += 8 + _length(self._data, at)[0]
        except (struct.error, OverflowError) as error:
            raise self._cut_short(what) from error
        if at > len(self._data):
            raise self._cut_short(what)
        self._at = at
        return start

    def _number(self, layout: str, what: str) -> int:
        start = self._skip(struct.calcsize(layout), what)
        return struct.unpack_from(layout, self._data, start)[0]

    def _string(self, what: str) -> str:
        length = self._number("<Q", what)
        start = self._skip(length, what)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self._path}: {what} at byte {start} is not UTF-8 text") from error

    def _count(self, what: str, least_bytes: int) -> int:
        """A count of things that take at least so many bytes each."""
        count = self._number("<Q", f"the number of {what}")
        if count > (len(self._data) - self._at) // least_bytes:
            raise InputError(
                f"{self._path}: claims {count} {what}, more than a {len(self._data)}-byte file "
                "holds; it is truncated or damaged"
            )
        return count

    def _cut_short(self, what: str) -> InputError:
        return InputError(
            f"{self._path}: {what} runs past the end of the {len(self._data)}-byte file; it is "
            "truncated or damaged"
        )


def _alignment(path: Path, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise InputError(
            f"{path}: general.alignment is {alignment!r}, expected a power of two >= 8"
        )
    return alignment
