"""LoRA adapters beside their base: directories in peft's own format.

    adapter_config.json         r, lora_alpha, base_model_name_or_path, ... as peft writes them
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight (r, K), .lora_B.weight (N, r)

A matrix W of the base is then W + lora_alpha / r * B A; with rsLoRA by the root of r. The base is a
directory or a .gguf file within the adapter's directory: no name in a file becomes a path outside,
nor a download. What `engine heal` writes also says in its metadata which base it learnt on, by
lineage hash.
"""

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.architecture.config import ModelConfig
from engine.architecture.families import layer_parts, layer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.files import TOKENIZER_FILES, read_json
from engine.checkpoint.safetensors import SafetensorsFile, refuse_pickles
from engine.errors import InputError
from engine.kernels.dtypes import DTYPES

if TYPE_CHECKING:
    import torch

    from engine.checkpoint.gguf_blocks import GgufBlocks
    from engine.kernels.w4.format import Packed, Spec

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
LINEAGE = "base_lineage"  # in the metadata: hash of the base's norms (weights.lineage_hash)
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MODULE = re.compile(r"[\w.]+", re.ASCII)  # of the patterns that peft takes, names alone
_LARGEST = 1e6  # of lora_alpha: far above any use
# Settings under which W + scale * B A is not what peft computes, by the values that are harmless.
_UNREAD: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None,),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    # Others take their part out of W (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ).
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),
    "alora_invocation_tokens": (None, []),  # from which on it is applied
    "arrow_config": (None,),
    "kasa_config": (None,),
    "velora_config": (None,),
    "monteclora_config": (None,),
}


@dataclass(frozen=True)
class Pair:
    """A (r, K) and B (N, r) of one matrix, floats."""

    a: "torch.Tensor"
    b: "torch.Tensor"


@dataclass(frozen=True)
class Place:
    """Where the sum of a fused matrix's rows goes: a stored tensor, and its first row in it."""

    name: str
    first: int
    rows: int


class AdaptedCheckpoint:
    """A `Checkpoint` over `base`: matrices that have a pair are its own plus scale * B A, float32.

    `pairs` go by the module that transformers' model has ("model.layers.0.mlp.down_proj"), fused
    where its family fuses. InputError where one of them is not of this base.
    """

    def __init__(
        self, base: Checkpoint, pairs: Mapping[str, Pair], scale: float, path: Path | None = None
    ) -> None:
        self.base, self.pairs, self.scale = base, dict(pairs), scale
        self.path = base.path if path is None else path
        # It is no packed directory any more: half of its matrices are floats.
        source = {k: v for k, v in base.config.source.items() if k != "quantization_config"}
        self.config = replace(base.config, source=source)
        known = places(base.config, base.names())
        self._held: dict[str, tuple[Pair, Place]] = {}
        for module, pair in pairs.items():
            shape, stored = known.get(module, (None, []))
            if shape is None:
                raise InputError(
                    f"{self.path}: adapts {module!r}, which is no matrix of a layer of {base.path}"
                )
            found = (pair.b.shape[0], pair.a.shape[1])
            if found != shape:
                raise InputError(
                    f"{self.path}: {module}: expected an adapter of {shape} for {base.path}, "
                    f"found one of {found}"
                )
            self._held |= {place.name: (pair, place) for place in stored}

    def names(self) -> Collection[str]:
        return self.base.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(name)

    def dtype(self, name: str) -> str | None:
        return "float32" if name in self._held else self.base.dtype(name)

    def nbytes(self, name: str) -> int:
        """A and B are counted with the first rows of what they adapt."""
        nbytes = self.base.nbytes(name)
        if name in self._held and self._held[name][1].first == 0:
            pair = self._held[name][0]
            nbytes += pair.a.nbytes + pair.b.nbytes
        return nbytes

    def read(self, name: str) -> "torch.Tensor":
        stored = self.base.read(name)
        if name not in self._held:
            return stored
        pair, place = self._held[name]
        b = pair.b[place.first : place.first + place.rows].float()
        return stored.float() + self.scale * (b @ pair.a.float())

    def packed(self, name: str) -> "GgufBlocks | Packed | None":
        return None if name in self._held else self.base.packed(name)

    def spec(self, name: str) -> "Spec | None":
        return None if name in self._held else self.base.spec(name)

    def forget(self) -> None:
        self.base.forget()


def places(
    config: ModelConfig, names: Collection[str]
) -> dict[str, tuple[tuple[int, ...], list[Place]]]:
    """Module -> (N, K) and the tensors of `names` that hold its rows, of all layers' matrices."""
    found: dict[str, tuple[tuple[int, ...], list[Place]]] = {}
    for layer in range(config.total_layers):
        parts = layer_parts(config, layer).values()
        for name, shape in layer_tensors(config, layer).values():
            if len(shape) != 2:
                continue
            whole = [Place(name, 0, shape[0])]
            apart = [Place(p.name, p.first, p.shape[0]) for p in parts if p.fused == (name, shape)]
            stored = whole if name in names or not apart else apart
            found[name.removesuffix(".weight")] = shape, stored
    return found


def is_adapter(path: Path) -> bool:
    return (Path(path) / CONFIG).is_file()


def directories(path: Path) -> list[Path]:
    """Where the files of a model may lie: an adapter's directory and then its base, or the path."""
    path = Path(path)
    return [path, base_path(path)] if is_adapter(path) else [path]


def weight_files(path: Path) -> list[Path]:
    """Those that hold a model's weights, an adapter's base's too."""
    return [
        file
        for place in directories(path)
        for file in ([place] if place.is_file() else sorted(place.glob("*.safetensors")))
    ]


def stamps(path: Path) -> list[tuple[str, int, int]]:
    """What tells this model from others that lay or will lie in the same place."""
    names = "config.json", CONFIG, *TOKENIZER_FILES
    read = [place / name for place in directories(path) for name in names]
    files = [*weight_files(path), *filter(Path.is_file, read)]
    found = [(file.resolve(), file.stat()) for file in files]
    return [(str(file), stat.st_mtime_ns, stat.st_size) for file, stat in found]


def base_path(path: Path) -> Path:
    """Of the model that an adapter's directory is for; InputError where it is not here."""
    said = read_json(path / CONFIG).get("base_model_name_or_path")
    where = f"{path / CONFIG}: base_model_name_or_path"
    # Of a path, or of a name on the hub, the last part: nothing outside of the directory.
    name = Path(said).name if isinstance(said, str) else ""
    if name in ("", ".."):
        raise InputError(
            f"{where}: expected the name of a directory or .gguf file that lies beside it, found "
            f"{said!r:.200}"
        )
    base = os.path.join(path, name)
    if not (os.path.isdir(base) or (base.endswith(".gguf") and os.path.isfile(base))):
        raise InputError(
            f"{where}: there is no directory or .gguf file {name!r:.200} beside it; put the base "
            "model or a link to it there"
        )
    if is_adapter(Path(base)):
        raise InputError(f"{where}: {name!r:.200} is an adapter itself")
    return Path(base)


def open_adapted(path: Path) -> AdaptedCheckpoint:
    """Base and adapter of a directory. InputError, with the reason, for what is damaged, of another
    model, or computed otherwise than by B A alone."""
    from engine.checkpoint import open_checkpoint

    said = read_json(path / CONFIG)
    terms = _Terms(path / CONFIG, said)
    base = open_checkpoint(base_path(path))
    if not (path / WEIGHTS).is_file():
        refuse_pickles(path)
    file = SafetensorsFile(path / WEIGHTS)
    _check_base(path, base, file.metadata.get(LINEAGE))
    return AdaptedCheckpoint(base, _pairs(path / WEIGHTS, file, terms), terms.scale(), path)


class _Terms:
    """r and lora_alpha, of all modules and of some."""

    def __init__(self, where: Path, said: Mapping[str, Any]) -> None:
        self.where, self.rooted = where, bool(said.get("use_rslora"))
        if (kind := said.get("peft_type")) != "LORA":
            raise InputError(f"{where}: peft_type: expected 'LORA', found {kind!r:.80}")
        for name, harmless in _UNREAD.items():
            if (found := said.get(name)) not in harmless:
                raise InputError(f"{where}: {name}: {found!r:.80} is not supported")
        self.ranks = {"": self._rank("r", said.get("r"))}
        self.alphas = {"": self._alpha("lora_alpha", said.get("lora_alpha"))}
        for key, values, check in (
            ("rank_pattern", self.ranks, self._rank),
            ("alpha_pattern", self.alphas, self._alpha),
        ):
            patterns = said.get(key) or {}
            if not isinstance(patterns, dict) or not all(map(_MODULE.fullmatch, patterns)):
                raise InputError(f"{where}: {key}: {patterns!r:.80} is not supported")
            values |= {name: check(f"{key} {name}", value) for name, value in patterns.items()}

    def rank(self, module: str) -> int:
        return _of(module, self.ranks)

    def scale(self, module: str = "") -> float:
        """What B A is multiplied by."""
        rank = self.rank(module)
        return _of(module, self.alphas) / (math.sqrt(rank) if self.rooted else rank)

    def _rank(self, name: str, value: Any) -> int:
        if type(value) is not int or not 0 < value < 1 << 20:
            raise InputError(
                f"{self.where}: {name}: expected a rank from 1 to {(1 << 20) - 1}, "
                f"found {value!r:.80}"
            )
        return value

    def _alpha(self, name: str, value: Any) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value <= _LARGEST:
            expected = f"a number above 0, at most {_LARGEST:,.0f}"
            raise InputError(f"{self.where}: {name}: expected {expected}, found {value!r:.80}")
        return float(value)


def _of(module: str, values: Mapping[str, Any]) -> Any:
    """Of the first that names the module or its last parts, as peft looks them up; else of ""."""
    named = (name for name in values if name and f".{module}".endswith(f".{name}"))
    return values[next(named, "")]


def _pairs(where: Path, file: SafetensorsFile, terms: _Terms) -> dict[str, Pair]:
    """Of all modules, as `terms.scale()` multiplies them: B of those with another is rescaled."""
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, entry in file.entries.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{where}: tensor {name!r:.200} is none of a LoRA adapter's")
        rank = terms.rank(match[1])
        if len(entry.shape) != 2 or entry.shape["AB".index(match[2])] != rank:
            expected = f"({rank}, K)" if match[2] == "A" else f"(N, {rank})"
            raise InputError(f"{where}: {name}: expected shape {expected}, found {entry.shape}")
        if entry.dtype not in DTYPES:
            raise InputError(
                f"{where}: {name}: expected one of {', '.join(DTYPES)}, found {entry.dtype}"
            )
        halves.setdefault(match[1], {})[match[2]] = file.read(name)
    if not halves:
        raise InputError(f"{where}: holds no adapter")
    for module, half in halves.items():
        if len(half) != 2:
            lacking = "B" if "A" in half else "A"
            raise InputError(f"{where}: lacks {PREFIX}{module}.lora_{lacking}.weight")
        if (own := terms.scale(module) / terms.scale()) != 1:
            half["B"] = half["B"].float() * own
    return {module: Pair(half["A"], half["B"]) for module, half in halves.items()}


def _check_base(path: Path, base: Checkpoint, lineage: object) -> None:
    from engine.checkpoint.weights import lineage_hash

    if lineage is not None and lineage != lineage_hash(base, base.config):
        raise InputError(f"{path}: learnt on another model than {base.path}")
