"""What becomes of each tensor of a model when it is quantized."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, check_v_bits, layer_parts, outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.weights import Stored, describe, outer_weights, tiled_form, values
from engine.errors import InputError, check_choice
from engine.kernels.dtypes import DTYPES, dtype_of
from engine.kernels.w4 import store
from engine.kernels.w4.format import Packed, Spec
from engine.quantize import methods
from engine.quantize.grid import FITTED, UNIFORM

METHODS = ("gptq", "hqq", "rtn", "nf4", "keep")
SCHEMES = {"nf4": ("codebook",), "hqq": UNIFORM, "rtn": FITTED, "gptq": FITTED, "keep": FITTED}

# Tensors to store and what each of them was, both by their names in a packed directory.
Packing = tuple[dict[str, Packed | torch.Tensor], dict[str, str]]


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized; InputError for what cannot be.

    "keep" leaves every matrix in the bits that it has, the head aside. `head` is of the head, and
    of the embedding where that is tied; None leaves it as it is. `v` is of the matrices that make
    values for attention; None is chosen by `of`. `clip` is for rtn and gptq. A `scheme` and `clip`
    of "" are chosen: `default_scheme`, and "mse" for gptq.
    """

    method: str = "gptq"
    bits: int = 4
    group: int = 64  # 0: a row
    scheme: str = ""
    scale_dtype: str = "float16"
    clip: str = ""
    act_order: bool = False
    head: int | None = 8
    v: int | None = None

    def __post_init__(self) -> None:
        if not self.scheme:
            object.__setattr__(self, "scheme", default_scheme(self.method, self.bits, self.group))
        if not self.clip:
            object.__setattr__(self, "clip", "mse" if self.method == "gptq" else "minmax")
        choices = {
            "method": METHODS,
            "scheme": SCHEMES.get(self.method, ()),
            "scale_dtype": DTYPES,
            "clip": ("minmax", "mse"),
            "head": (4, 8, 16, None),
            "v": (*sorted({self.bits, 8}), None),
        }
        for name, allowed in choices.items():
            check_choice(name, getattr(self, name), allowed)
        if self.act_order and self.method != "gptq":
            raise InputError(f"act-order: belongs to gptq, not to {self.method}")
        if self.clip != "minmax" and self.method not in ("rtn", "gptq"):
            raise InputError(f"clip: belongs to rtn and gptq, not to {self.method}")
        try:
            _ = self.spec
        except ValueError as error:
            raise InputError(str(error)) from None

    def of(self, config: ModelConfig) -> "Recipe":
        """The same for one model, `v` chosen: 8 bits beside gptq's codebook where they are cheap.

        Where several heads read one head of values, v is a small matrix and does most of the harm
        (`benchmarks/results/quality.md`); the other schemes are of one kind throughout, as other
        engines have them. InputError for bits of its own where the family stores q, k and v as one
        matrix.
        """
        if self.method == "keep":
            return self
        if self.v is not None:
            check_v_bits(config, self.bits, self.v)
            return self
        fine = self.method == "gptq" and self.scheme == "codebook"
        cheap = FAMILIES[config.family].apart("v") and config.kv_heads < config.heads
        return replace(self, v=8 if fine and cheap else self.bits)

    @property
    def spec(self) -> Spec:
        """Of the layers' matrices, v aside where it has bits of its own."""
        return Spec(self.bits, self.group, self.scheme, dtype_of(self.scale_dtype))

    def rounded(self, bits: int) -> Spec:
        """Of a matrix that is rounded to nearest in other bits than the layers'."""
        return Spec(bits, self.group, "symmetric", dtype_of(self.scale_dtype))

    def to_json(self) -> dict[str, Any]:
        """What a packed directory's `quantization_config` says."""
        said = {"method": self.method, "head": self.head} if self.method == "keep" else asdict(self)
        return {"quant_method": store.METHOD, "version": store.VERSION} | said


def default_scheme(method: str, bits: int, group: int) -> str:
    """What loses least in about the same bits, by `benchmarks/results/quality.md`.

    Rounding alone keeps the scheme that every format knows.
    """
    if method == "nf4":
        return "codebook"
    if method == "hqq":
        return "minimum"
    if method != "gptq" or bits == 8:
        return "symmetric"
    return "minimum" if group in (16, 32) else "codebook"


def pack_layer(
    path: Path,
    config: ModelConfig,
    slot: int,
    recipe: Recipe,
    stored: Mapping[str, Stored],
    hessians: Mapping[str, torch.Tensor],
) -> Packing:
    """One layer, by role in the checkpoint at `path`; `hessians` by role are for gptq."""
    parts, originals = (layer_parts(config, n) for n in (slot, config.layers[slot].layer))
    packed: dict[str, Packed | torch.Tensor] = {}
    sources: dict[str, str] = {}
    for role, matrix in stored.items():
        name, where = parts[role].name, f"{path}: {originals[role].name}"
        if len(matrix.shape) != 2 or recipe.method == "keep":
            packed[name] = _kept(matrix, where)
        elif role == "v" and recipe.v not in (None, recipe.bits):
            packed[name] = methods.rtn(values(matrix), recipe.rounded(recipe.v), name=where)
        else:
            packed[name] = _quantized(matrix, recipe, where, hessians.get(role))
        sources[name] = describe(matrix)
    return packed, sources


def pack_outer(checkpoint: Checkpoint, config: ModelConfig, recipe: Recipe) -> Packing:
    """Embedding, final norm and head."""
    packed: dict[str, Packed | torch.Tensor] = {}
    sources: dict[str, str] = {}
    names = {role: name for role, (name, _) in outer_tensors(config).items()}
    for role, matrix in outer_weights(checkpoint, config):
        name, where = names[role], f"{checkpoint.path}: {names[role]}"
        if role == ("embedding" if config.tied else "head"):
            packed[name] = _head(matrix, recipe, where)
        elif role == "embedding" and recipe.method != "keep" and isinstance(matrix, torch.Tensor):
            packed[name] = _half(matrix, where)
        else:
            packed[name] = _kept(matrix, where)
        sources[name] = describe(matrix)
    return packed, sources


def _quantized(
    matrix: Stored, recipe: Recipe, where: str, hessian: torch.Tensor | None = None
) -> Packed:
    """By the recipe's method; gptq becomes rtn where there is no Hessian."""
    weight, spec = values(matrix), recipe.spec
    if recipe.method == "nf4":
        return methods.nf4(weight, spec, where)
    if recipe.method == "hqq":
        return methods.hqq(weight, spec, where)
    if hessian is None:
        return methods.rtn(weight, spec, recipe.clip, where)
    return methods.gptq(
        weight, hessian, spec, act_order=recipe.act_order, clip=recipe.clip, name=where
    )


def _head(matrix: Stored, recipe: Recipe, where: str) -> Packed | torch.Tensor:
    if recipe.head is None:
        return _kept(matrix, where)
    if recipe.head == 16:
        return _half(matrix, where)
    if recipe.head == 4 and recipe.bits == 4 and recipe.method != "keep":
        return _quantized(matrix, recipe, where)
    return methods.rtn(values(matrix), recipe.rounded(recipe.head), name=where)


def _kept(matrix: Stored, where: str) -> Packed | torch.Tensor:
    if isinstance(matrix, GgufBlocks):
        return tiled_form(matrix, where)
    if isinstance(matrix, torch.Tensor) and not matrix.isfinite().all():
        raise InputError(f"{where}: holds NaN or Inf")
    return matrix


def _half(matrix: Stored, where: str) -> torch.Tensor:
    """In its own 16-bit dtype, else in float16."""
    if isinstance(matrix, torch.Tensor) and matrix.dtype.itemsize == 2:
        half = matrix
    else:
        half = values(matrix).half()
    if not half.isfinite().all():
        raise InputError(f"{where}: holds NaN, Inf or values beyond {half.dtype}")
    return half
