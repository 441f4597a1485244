"""What a model costs: parameters, bytes and FLOPs, from its config alone, before and after.

Counts are exact for the shapes, bytes those of a packed directory without the 64 of each matrix's
codebook. FLOPs count a multiply and an add as two. GB is 1e9 bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from engine.architecture.config import ModelConfig
from engine.architecture.families import (
    MLP,
    check_v_bits,
    layer_parts,
    layer_tensors,
    outer_tensors,
)
from engine.architecture.hf_config import from_hf
from engine.artifacts import Artifact
from engine.errors import InputError

PARTS = ("embedding", "attention", "mlp", "norms", "head", "scales")
MOST = 10**30  # of anything counted: what is more than any config and context give
MOST_CONTEXT = 10**12

_LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5}


def _shape(layers: int, hidden: int, ffn: int, heads: int, vocab: int, **more: Any) -> dict:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    } | more


# The models of the paper and their successors, as their config.json files have them.
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA | _shape(32, 4096, 11008, 32, 32000, max_position_embeddings=4096),
    "llama-2-13b": _LLAMA | _shape(40, 5120, 13824, 40, 32000, max_position_embeddings=4096),
    "llama-2-70b": _LLAMA
    | _shape(80, 8192, 28672, 64, 32000, max_position_embeddings=4096, num_key_value_heads=8),
    "llama-3-8b": _LLAMA
    | _shape(32, 4096, 14336, 32, 128256, max_position_embeddings=8192, num_key_value_heads=8),
    "llama-3-70b": _LLAMA
    | _shape(80, 8192, 28672, 64, 128256, max_position_embeddings=8192, num_key_value_heads=8),
    "mistral-7b": {"architectures": ["MistralForCausalLM"]}
    | _shape(32, 4096, 14336, 32, 32000, max_position_embeddings=32768, sliding_window=4096),
    # Qwen-1 has the tensors of Qwen-2: biases on q, k and v alone, no tying.
    "qwen-7b": {"architectures": ["Qwen2ForCausalLM"]}
    | _shape(32, 4096, 11008, 32, 151936, max_position_embeddings=8192),
    "qwen-14b": {"architectures": ["Qwen2ForCausalLM"]}
    | _shape(40, 5120, 13696, 40, 152064, max_position_embeddings=8192),
    "phi-2": {"architectures": ["PhiForCausalLM"]}
    | _shape(32, 2560, 10240, 32, 51200, max_position_embeddings=2048, partial_rotary_factor=0.4),
}


@dataclass(frozen=True)
class Storage:
    """How weights are stored: matrices of layers in `bits`, a scale a `group` (0: a row).

    `head_bits` is for the head, and for the embedding where it is tied; an embedding of its own,
    norms and biases stay in 16 bits. `v_bits` is for v; 0: as the other matrices. `scale_bits`
    counts what every group carries beside the codes: 16 for a scale, 32 for a scale and a minimum.
    16 bits mean no groups.
    """

    bits: int = 16
    group: int = 128
    head_bits: int = 16
    scale_bits: int = 16
    v_bits: int = 0

    @classmethod
    def of(cls, bits: int, group: int, scheme: str, head: int | None, v: int | None) -> Self:
        """Of a recipe's words; None: a head in 16 bits, v as the other matrices."""
        scale_bits = 32 if scheme == "minimum" else 16
        return cls(bits, group, 16 if head is None else head, scale_bits, v or 0)

    def __post_init__(self) -> None:
        for name, said in (("bits", "bits"), ("head_bits", "head"), ("v_bits", "v")):
            found = getattr(self, name)
            if found not in (4, 8, 16) and (name, found) != ("v_bits", 0):
                raise InputError(f"{said}: expected 4, 8 or 16, found {found}")
        if self.group < 0:
            raise InputError(f"group: expected 0 (a row) or more, found {self.group}")


@dataclass(frozen=True)
class Cost:
    """One model in numbers. Per token means one decoded token at `context` positions of cache."""

    layers: int
    parameters: dict[str, int]  # by part; a tied head counts once, as embedding
    weight_bytes: dict[str, int]  # by part
    kv_bytes_per_token: int  # added to the cache by every token
    kv_bytes: int  # at the context
    flops_per_token: int
    attention_flops_per_token: int  # of them, over the cache
    bytes_per_token: int  # weights and cache read

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_weight_bytes(self) -> int:
        return sum(self.weight_bytes.values())


@dataclass(frozen=True)
class Budget(Artifact):
    """The file as it is, before (all layers, 16 bits) and after (kept layers, as stored)."""

    kind: ClassVar[str] = "budget"

    model: str
    context: int
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    storage: Mapping[str, int]
    keep: tuple[int, ...]
    file: Mapping[str, int] | None = None  # bytes by part as they lie on disk, all layers; None:
    # a config alone

    def __post_init__(self) -> None:
        counts = {field.name for field in fields(Cost)} | {"total_parameters", "total_weight_bytes"}
        by_part = ("parameters", "weight_bytes")
        for name in ("before", "after"):
            side = getattr(self, name)
            if set(side) != counts or any({*dict(side[part])} != {*PARTS} for part in by_part):
                raise ValueError(f"{name}: expected {', '.join(sorted(counts))}")
            numbers = [side[count] for count in counts if count not in by_part]
            numbers += [value for part in by_part for value in side[part].values()]
            if not all(type(number) is int and 0 <= number <= MOST for number in numbers):
                raise ValueError(f"{name}: expected whole numbers from 0 to {MOST:.0e}")
            if any(side[f"total_{part}"] != sum(side[part].values()) for part in by_part):
                raise ValueError(f"{name}: the totals are not the sums of the parts")
            if side["attention_flops_per_token"] > side["flops_per_token"]:
                raise ValueError(f"{name}: attention takes more than all FLOPs")
        if self.file is not None:
            sizes = list(self.file.values())
            if set(self.file) != set(PARTS) or not all(type(n) is int and n >= 0 for n in sizes):
                raise ValueError(f"file: expected bytes of {', '.join(PARTS)}")
        if set(self.storage) != {field.name for field in fields(Storage)}:
            raise ValueError(f"storage: expected {', '.join(f.name for f in fields(Storage))}")


def cost(config: ModelConfig, storage: Storage = Storage(), context: int = 4096) -> Cost:
    """The Cost of the layers that `config` keeps.

    InputError for a v of bits of its own in a family that stores it with q and k.
    """
    if not 1 <= context <= MOST_CONTEXT:
        raise InputError(f"context: expected 1 to {MOST_CONTEXT:,}, found {context}")
    check_v_bits(config, storage.bits, storage.v_bits or storage.bits)
    parameters, codes, flops = dict.fromkeys(PARTS, 0), dict.fromkeys(PARTS, 0), 0
    read = 0

    def count(part: str, shape: tuple[int, ...], bits: int, used: bool = True) -> None:
        nonlocal flops, read
        size = math.prod(shape)
        matrix = len(shape) == 2
        stored, scales = 2 * size, 0
        if matrix and bits < 16:
            stored, scales = packed_bytes(shape, bits, storage.group, storage.scale_bits)
        parameters[part] += size
        codes[part] += stored
        codes["scales"] += scales
        if used:
            flops += 2 * size if matrix else 0
            read += stored + scales

    for role, (_, shape) in outer_tensors(config).items():
        if role == "embedding":
            tied = config.tied
            count("embedding", shape, storage.head_bits if tied else 16, used=tied)
        else:
            count(_part(role), shape, storage.head_bits)
    read += 0 if config.tied else 2 * config.hidden_size  # one row of the embedding
    for entry in config.layers:
        for role, (_, shape) in layer_tensors(config, entry.layer).items():
            bits = storage.v_bits if role == "v" and storage.v_bits else storage.bits
            count(_part(role), shape, bits)
    seen = [min(context, entry.window or context) for entry in config.layers]
    row = 4 * config.kv_heads * config.head_dim  # a layer's keys and values, 2 bytes each
    over_cache = sum(4 * config.heads * config.head_dim * positions for positions in seen)
    return Cost(
        layers=len(config.layers),
        parameters=parameters,
        weight_bytes=codes,
        kv_bytes_per_token=row * len(config.layers),
        kv_bytes=row * len(config.layers) * context,
        flops_per_token=flops + over_cache,
        attention_flops_per_token=over_cache,
        bytes_per_token=read + row * sum(seen),
    )


def file_bytes(config: ModelConfig, sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part of a checkpoint's tensors, `sizes` by the names they are stored under.

    A quantized matrix lies in several tensors (q_proj.qweight, q_proj.scales, ...), and GGUF blocks
    hold their scales: they count with their matrix. What a decoder does not read is left out.
    """
    found = dict.fromkeys(PARTS, 0)
    parts = {}
    for role, (name, _) in outer_tensors(config).items():
        parts[name.rpartition(".")[0]] = _part(role)
    for layer in range(config.total_layers):
        for role, (name, _) in layer_tensors(config, layer).items():
            parts[name.rpartition(".")[0]] = _part(role)
        for role, part in layer_parts(config, layer).items():
            parts[part.name.rpartition(".")[0]] = _part(role)
    for name, nbytes in sizes.items():
        module = name
        while module and module not in parts:
            module = module.rpartition(".")[0]
        if module:
            found[parts[module]] += nbytes
    return found


def _part(role: str) -> str:
    """The one of PARTS that a role belongs to."""
    base = role.partition(".")[0]
    if base in ("embedding", "head"):
        return base
    return "norms" if "norm" in base else "mlp" if base in MLP else "attention"


def budget(
    name: str,
    config: ModelConfig,
    keep: ModelConfig,
    storage: Storage,
    context: int,
    file: Mapping[str, int] | None = None,
) -> Budget:
    """Before and after: `config` with all its layers in 16 bits, `keep` as stored; `file` is what
    `file_bytes` finds on disk."""
    before, after = cost(config, Storage(), context), cost(keep, storage, context)
    return Budget(
        model=name,
        context=context,
        before=vars(before) | _totals(before),
        after=vars(after) | _totals(after),
        storage=dict(vars(storage)),
        keep=tuple(entry.layer for entry in keep.layers),
        file=None if file is None else dict(file),
    )


def packed_bytes(shape: Sequence[int], bits: int, group: int, scale_bits: int) -> tuple[int, int]:
    """Those of (codes, scales) of a matrix (N, K) in a packed directory: tiles of 16 rows and whole
    blocks of 32 columns, and of each tile whole lines of scales (csrc/cpu/w4_layout.cpp)."""
    tiles, columns = -(-shape[0] // 16), -(-shape[1] // 32) * 32
    groups = -(-columns // group) if group else 1
    lines = -(-16 * groups * scale_bits // (8 * 64))
    return tiles * 16 * columns * bits // 8, tiles * lines * 64


def smallest_drop(config: ModelConfig, storage: Storage, target_bytes: int) -> int:
    """The fewest layers to drop so that the weights fit; InputError when one layer does not."""
    layers = [entry.layer for entry in config.layers]
    for count in range(len(layers)):
        kept = config.keep(layers[: len(layers) - count])
        if cost(kept, storage, 1).total_weight_bytes <= target_bytes:
            return count
    least = cost(config.keep(layers[:1]), storage, 1).total_weight_bytes
    raise InputError(
        f"target-memory: one layer alone takes {least:,} bytes, more than {target_bytes:,}; "
        "store fewer bits"
    )


def built_in(name: str) -> ModelConfig | None:
    """The config of a model in MODELS, by name in any case; None for any other."""
    raw = MODELS.get(name.lower())
    return None if raw is None else from_hf(raw, name)


def _totals(found: Cost) -> dict[str, int]:
    return {
        "total_parameters": found.total_parameters,
        "total_weight_bytes": found.total_weight_bytes,
    }
