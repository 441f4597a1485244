"""Files as memory: whole-file mappings, views of them as tensors, and JSON with clear errors."""

import errno
import json
import math
import mmap
import os
import stat
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from engine.errors import InputError

if TYPE_CHECKING:
    import torch

TOKENIZER_FILES = (  # of a directory, and what else says how text is read and ends
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
_MAP_NORESERVE = 0x4000  # Linux; the mmap module names it only since Python 3.13


def open_regular(path: Path) -> BinaryIO:
    """A file for reading; OSError for a pipe or a device, which may have no end."""
    flags = os.O_RDONLY | os.O_NONBLOCK
    file = open(path, "rb", opener=lambda name, _: os.open(name, flags))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "expected a file, found a pipe or a device", str(path))
    return file


def read_regular(path: Path) -> bytes:
    """A file's bytes; InputError where it is missing, unreadable or not a file."""
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error


def map_file(path: Path) -> mmap.mmap:
    """The file's bytes, mapped: pages are read when touched, and writes never reach the file.

    The mapping is writable (copy on write) because torch refuses to wrap read-only memory without
    a warning. Linux would count such a mapping against free memory and refuse a file larger than
    that, hence MAP_NORESERVE.

    Raises:
        InputError: the file is missing, unreadable, empty or not a file.
    """
    try:
        with open_regular(path) as file:
            if sys.platform == "linux":
                flags, prot = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
                return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # mmap's answer to length 0
        raise InputError(f"{path}: the file is empty") from error


def ask_for_huge_pages(mapped: mmap.mmap) -> None:
    """Has the system read a mapped file in pages of 2 MB where it can.

    From small ones a model that is multiplied in its file, and that no cache holds, decodes 2-3 %
    slower. What the system holds of the file already stays as it is.
    """
    if sys.platform == "linux":
        with suppress(OSError):  # built without them
            mapped.madvise(mmap.MADV_HUGEPAGE)


def forget(mapped: mmap.mmap) -> None:
    """Lets go of a mapped file's pages, which come back from the system's cache when touched."""
    if sys.platform == "linux":
        mapped.madvise(mmap.MADV_DONTNEED)


def view(
    data: "torch.Tensor", offset: int, dtype: "torch.dtype", shape: tuple[int, ...]
) -> "torch.Tensor":
    """`shape` values of `dtype` at a byte offset of `data` (bytes,) uint8.

    A view, or a copy where the offset is not a multiple of the item size.
    """
    part = data[offset : offset + math.prod(shape) * dtype.itemsize]
    if offset % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(shape)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; InputError when it is missing, malformed or not an object."""
    return parse_json(read_regular(path), str(path))


def parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`, without repeated names; `where` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: malformed, or not UTF-8
        raise InputError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {repeated!r} appears twice")
    return value
