"""Packed matrices in safetensors files, in the layout that the CPU kernels read.

`layer.weight` becomes `layer.weight.tiles` and, of some schemes, `.supers`, `.codebook` and
`.perm`; the file's metadata holds, under `layer.weight`, the spec and shape as JSON, and `gguf`,
the type of blocks that lie there in six bits a weight. Files of version 2 have none of these, files
of version 1 the arrays of `Packed` instead, `.codes`, `.scales` and so on; both are read too.
"""

import json
from collections.abc import Callable

import torch

from engine.kernels.w4.format import Packed, Spec, expected_tensors, validate
from engine.kernels.w4.tiled import SIXES, Tiled, expected_parts

METHOD = "shallow"  # the quant_method of directories that hold them
VERSION = 3
PARTS = ("tiles", "supers", "codebook", "perm", "codes", "scales", "zeros", "mins")


def to_tensors(name: str, packed: Packed) -> dict[str, torch.Tensor]:
    """The tensors to store, by name."""
    return {f"{name}.{part}": tensor for part, tensor in Tiled.from_packed(packed).stored.items()}


def to_metadata(name: str, packed: Packed) -> dict[str, str]:
    """The metadata to store beside them."""
    perm = packed.perm is not None
    described = packed.spec.to_json() | {"shape": list(packed.shape), "perm": perm}
    if isinstance(packed, Tiled) and packed.gguf is not None:
        described["gguf"] = packed.gguf
    return {name: json.dumps(described)}


def parse_metadata(name: str, described: str) -> tuple[Spec, tuple[int, int], bool, str | None]:
    """Spec, (N, K), whether there is a permutation, and the GGUF type of tiles in six bits;
    ValueError that names `name`."""
    try:
        fields = json.loads(described)
        if not isinstance(fields, dict):
            raise ValueError(f"expected an object, found {described:.40}")
        shape, perm, gguf = fields.pop("shape"), fields.pop("perm"), fields.pop("gguf", None)
        spec = Spec.from_json(fields)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}: unusable quantization metadata: {error}") from None
    sizes = isinstance(shape, list) and len(shape) == 2
    if not sizes or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name}: shape must be two positive integers, found {shape!r}")
    if type(perm) is not bool:
        raise ValueError(f"{name}: perm must be true or false, found {perm!r}")
    if gguf is not None and (type(gguf) is not str or gguf not in SIXES):
        raise ValueError(f"{name}: gguf must be one of {', '.join(SIXES)}, found {gguf!r}")
    if gguf is not None and perm:
        raise ValueError(f"{name}: perm must be false where gguf is {gguf}, found true")
    return spec, tuple(shape), perm, gguf


def from_tensors(
    name: str, read: Callable[[str], torch.Tensor], described: str, version: int = VERSION
) -> Packed:
    """The matrix that `to_tensors` and `to_metadata` stored; `read` maps a tensor's name to it.

    Raises ValueError or TypeError where metadata and tensors disagree, and what `read` raises.
    """
    spec, shape, perm, gguf = parse_metadata(name, described)
    if gguf is not None and version < VERSION:
        raise ValueError(f"{name}: gguf is of version {VERSION}, found in a file of {version}")
    more = ["perm"] if perm else []
    if version == 1:
        parts = [*expected_tensors(spec, shape), *more]
        read_parts = {part: read(f"{name}.{part}") for part in parts}
        return validate(Packed(spec, shape, **read_parts), name)
    parts = ["tiles", *expected_parts(spec, shape, gguf), *more]
    return Tiled(spec, shape, {part: read(f"{name}.{part}") for part in parts}, name, gguf)
