"""Writing a GGUF: its header by the gguf package, then the tensors, one in memory at a time.

`out` is begun beside as the directory `out`.partial; a killed run goes on behind the last tensor
that is whole.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint.gguf_blocks import BLOCK_TYPES
from engine.checkpoint.gguf_file import GgufTensor
from engine.errors import InputError
from engine.export import directory
from engine.scratch import Scratch, check_new, write_errors

Progress = Callable[[int, int], None]
_TYPES = {kind.name: kind for kind in BLOCK_TYPES.values()}
_INTEGER, _FLOAT, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9  # GGUF's uint32, float32, ...


@dataclass(frozen=True)
class Value:
    """Metadata with its GGUF type; `items` is that of an array's items."""

    value: Any
    kind: int
    items: int | None = None


@dataclass(frozen=True)
class Place:
    """A tensor to be written: `shape` has K last."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def tensor(self) -> GgufTensor:
        """As a reader of the file finds it, but for where it lies."""
        return GgufTensor(_TYPES[self.type], self.shape, 0)

    @property
    def row_shape(self) -> tuple[int, ...]:
        return (*self.shape[:-1], self.tensor.row_bytes)


def typed(value: Any) -> Value:
    """The types that llama.cpp asks for: uint32, float32, bool, string, arrays of int32, ..."""
    kinds = {bool: _BOOL, int: _INTEGER, float: _FLOAT, str: _STRING}
    if isinstance(value, list):
        first = type(value[0])
        return Value(value, _ARRAY, 5 if first is int else kinds[first])
    return Value(value, kinds[type(value)])


def typed_fields(said: Mapping[str, Any]) -> dict[str, Value]:
    """Without empty lists, which have no type: the package does not write them."""
    return {key: typed(value) for key, value in said.items() if value != []}


def write_gguf(
    out: Path,
    source: Path,
    config: ModelConfig,
    fields: Mapping[str, Value],
    places: Sequence[Place],
    data: Callable[[int], Iterator[torch.Tensor]],
    progress: Progress | None = None,
) -> None:
    """The new file `out`; `data(first)` gives the bytes of the tensors from that one on.

    `source`, `config` and the header are what a run that was killed must have had to be gone on
    with. InputError where the file exists or the disk is full.
    """
    header = _header(fields, places)
    digest = hashlib.sha256(header).hexdigest()
    partial = directory.begin_empty(out, source, config, digest)
    alignment = _alignment(fields)
    header += bytes(-len(header) % alignment)
    sizes = [place.tensor.nbytes for place in places]
    ends = [*accumulate((size + -size % alignment for size in sizes), initial=len(header))]
    whole = partial / "model.gguf"
    with write_errors(out, ends[-1]):
        written = whole.stat().st_size if whole.exists() else 0
        done = max(sum(end <= written for end in ends) - 1, 0)  # tensors that are there
        with open(whole, "r+b" if written >= len(header) else "wb") as file:
            if written < len(header):
                file.write(header)
            file.truncate(ends[done])
            file.seek(ends[done])
            for index, tensor in enumerate(data(done), done):
                assert tensor.numel() == sizes[index], places[index]
                file.write(tensor.contiguous().numpy().data)
                file.write(bytes(-sizes[index] % alignment))
                file.flush()  # what is there is whole, should the run be killed
                if progress is not None:
                    progress(index + 1, len(places))
        check_new(out)
        whole.replace(out)
        Scratch.held(partial).remove()


def _alignment(fields: Mapping[str, Value]) -> int:
    return fields["general.alignment"].value if "general.alignment" in fields else 32


def require_name(out: Path) -> None:
    if out.suffix != ".gguf":
        raise InputError(
            f"{out}: a GGUF is one file: expected a name that ends in .gguf (a directory is what "
            "`engine export --to hf` writes)"
        )


def _header(fields: Mapping[str, Value], places: Sequence[Place]) -> bytes:
    """Everything before the tensors, in memory: the package opens files alone, and one elsewhere
    than beside the output asks for room on another disk."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(None, fields["general.architecture"].value)
    writer.data_alignment = _alignment(fields)
    writer.kv_data[0].clear()  # the architecture, which is among the fields
    for key, field in fields.items():
        items = None if field.items is None else gguf.GGUFValueType(field.items)
        writer.add_key_value(key, field.value, gguf.GGUFValueType(field.kind), items)
    for place in places:
        kind, rows = gguf.GGMLQuantizationType[place.type], np.dtype(np.uint8)
        writer.add_tensor_info(place.name, place.row_shape, rows, place.tensor.nbytes, kind)
    held = io.BytesIO()
    writer.fout = [io.BufferedWriter(held)]
    writer.state = gguf.gguf_writer.WriterState.EMPTY  # as behind opening a file
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return held.getvalue()
