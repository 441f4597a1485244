"""What a decoder is: shapes, the rules its family fixes, and one entry for every layer.

Shape letters, used in every docstring:

    B batch    T tokens   C context   D hidden     H heads   G kv heads   E head dim
    F ffn      V vocab    L layers    S slots      M rows    N outputs    K inputs     g group

`layer` is an index in the original checkpoint; `slot` is a position in the running model.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from engine.architecture import schema
from engine.architecture.layers import format_layers
from engine.errors import InputError

_DIVISORS = {"divisors": ("longrope", "divisors"), "long_divisors": ("longrope",)}  # whose kind


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of the first `dim` values of a head (Su et al., 2104.09864) and its scaling.

    `kind`: "default"; "linear" and "dynamic" (NTK) by `factor`; "llama3" by wavelength bands;
    "yarn" (Peng et al., 2309.00071); "longrope" (Ding et al., 2402.13753) with one divisor a
    frequency, short or long by the length of the sequence; "divisors", the same without the
    choice, as a GGUF stores llama3. `attention_factor` multiplies cos and sin.
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        schema.check(self, schema.FREQUENCIES)
        schema.require(self.dim % 2 == 0, "dim", "an even number", self.dim)
        for name, kinds in _DIVISORS.items():
            count, found = self.dim // 2 if self.kind in kinds else 0, len(getattr(self, name))
            schema.require(found == count, name, f"{count} numbers", found)
        if self.kind in ("dynamic", "llama3", "yarn", "longrope"):
            context = self.original_context
            schema.require(context > 1, "original_context", "more than 1", context)
        if self.kind == "dynamic":
            schema.require(self.dim > 2, "dim", "more than 2 for dynamic scaling", self.dim)
        if self.kind == "yarn":
            schema.require(self.theta > 1, "theta", "more than 1 for yarn", self.theta)
        if self.kind == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            schema.require(low < high, "high_freq_factor", f"more than low_freq_factor {low}", high)


def yarn_attention(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies cos and sin by where a config says nothing (2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer, so that dropping a layer drops its settings too."""

    layer: int
    window: int | None = None  # a query sees this many positions, itself included; None: all
    rope: Rope | None = None  # None: no position embedding (NoPE)

    def __post_init__(self) -> None:
        schema.check(self, schema.LAYER)


@dataclass(frozen=True)
class ModelConfig:
    """A decoder as the reference, the kernels and the budget see it.

    They may trust it: one that holds what a decoder does not take cannot be made (InputError).
    """

    family: str
    architecture: str  # the Hugging Face class name
    hidden_size: int  # D
    vocab_size: int  # V
    heads: int  # H
    kv_heads: int  # G
    head_dim: int  # E
    ffn_size: int  # F
    max_context: int
    layers: tuple[LayerConfig, ...]  # L, or fewer after keep()
    total_layers: int  # L of the original checkpoint
    norm: str = "rms"  # "rms" | "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to stored norm weights (Gemma: 1)
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None  # "head": over E; "all": over all heads of a token
    activation: str = "silu"  # "silu" | "gelu" | "gelu_tanh" | "relu"
    gated: bool = True
    parallel: bool = False  # attention and MLP read the same normed input (Phi-2)
    biases: frozenset[str] = frozenset()  # the roles that carry a bias
    attention_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tied: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    source: dict[str, Any] = field(default_factory=dict, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        schema.check(self, schema.MODEL)
        schema.require(
            self.heads % self.kv_heads == 0,
            "kv_heads",
            f"a divisor of {self.heads} heads",
            self.kv_heads,
        )
        numbers, total = [entry.layer for entry in self.layers], self.total_layers
        inside = bool(numbers) and numbers == sorted(set(numbers)) and numbers[-1] < total
        schema.require(inside, "layers", f"ascending numbers below {total}", numbers)
        for entry in self.layers:
            dim = 0 if entry.rope is None else entry.rope.dim
            schema.require(dim <= self.head_dim, "rope", f"at most {self.head_dim} values", dim)

    @property
    def architecture_hash(self) -> str:
        """Of the shapes alone: the same for every copy of a model, HF or GGUF, whatever its bits.

        Vocabulary, windows and rotary settings are left out; conversions pad or lose them.
        """
        shapes = (
            self.total_layers,
            self.hidden_size,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.ffn_size,
            self.norm,
            self.qk_norm,
            self.gated,
            self.parallel,
            self.post_norm,
        )
        return hashlib.sha256(repr(shapes).encode()).hexdigest()

    @cached_property
    def ropes(self) -> tuple[Rope, ...]:
        """Every rotary embedding that a layer has, once, in the order of the layers."""
        return tuple(dict.fromkeys(e.rope for e in self.layers if e.rope is not None))

    @cached_property
    def rope_switch(self) -> int | None:
        """Length past which a sequence is run anew, with LongRoPE's long divisors; None: never."""
        lengths = (rope.original_context for rope in self.ropes if rope.kind == "longrope")
        return min(lengths, default=None)

    @cached_property
    def whole_prefill(self) -> bool:
        """A prompt may not be cut into chunks: its rotation depends on how long it is in all."""
        return any(rope.kind in ("dynamic", "longrope") for rope in self.ropes)

    def keep(self, layers: Sequence[int]) -> "ModelConfig":
        """The same model with only these layers (original numbers, ascending)."""
        by_number = {entry.layer: entry for entry in self.layers}
        missing = [layer for layer in layers if layer not in by_number]
        if missing or list(layers) != sorted(set(layers)) or not layers:
            raise InputError(
                f"kept layers: expected ascending numbers out of {format_layers([*by_number])}, "
                f"found {list(layers)}"
            )
        return replace(self, layers=tuple(by_number[layer] for layer in layers))
