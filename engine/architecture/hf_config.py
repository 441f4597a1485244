"""A Hugging Face `config.json` (or the same keys, rebuilt from GGUF metadata) -> ModelConfig."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.architecture.config import LayerConfig, ModelConfig, Rope
from engine.architecture.families import FAMILIES, Family, family_of
from engine.errors import InputError

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "divisors")
_LARGEST = 1 << 24  # no size of a model is larger; a config that says so is wrong
_MOST_LAYERS = 4096


def from_hf(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the config of a supported architecture; every value is checked before it is used.

    `where` names the file in errors. InputError for an unknown architecture and for a value that
    is absent or of the wrong kind.
    """
    architectures = raw.get("architectures")
    if not isinstance(architectures, list | tuple) or not architectures:
        raise InputError(f"{where}: expected a list 'architectures', found {architectures!r}")
    key = family_of(str(architectures[0]), where)
    return _Reader(raw, where, key).model()


class _Reader:
    """One config being read: looks values up with the family's defaults, and checks them."""

    def __init__(self, raw: Mapping[str, Any], where: str, key: str) -> None:
        self.raw, self.where, self.key = raw, where, key
        self.family: Family = FAMILIES[key]

    def get(self, name: str, default: Any = None) -> Any:
        return self.raw[name] if name in self.raw else self.family.defaults.get(name, default)

    def size(self, name: str, default: int | None = None, largest: int = _LARGEST) -> int:
        value = self.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= largest:
            raise self.wrong(name, f"a whole number from 1 to {largest}", value)
        return value

    def number(self, name: str, default: float | None = None, values=None) -> float:
        value = self.get(name) if values is None else values.get(name)
        value = default if value is None else value
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self.wrong(name, "a number", value)
        return float(value)

    def positive(self, name: str, default: float | None = None, values=None) -> float:
        value = self.number(name, default, values)
        if value <= 0:
            raise self.wrong(name, "a number above 0", value)
        return value

    def wrong(self, name: str, expected: str, found: Any) -> InputError:
        return InputError(f"{self.where}: {name}: expected {expected}, found {found!r:.200}")

    def model(self) -> ModelConfig:
        family, get = self.family, self.get
        if get("use_bidirectional_attention"):
            raise self.wrong("use_bidirectional_attention", "false (a causal decoder)", True)
        hidden, heads = self.size("hidden_size"), self.size("num_attention_heads")
        kv_heads = self.size("num_key_value_heads", heads)
        head_dim = self.size("head_dim", max(hidden // heads, 1))
        if heads % kv_heads:
            raise self.wrong("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
        scale = self.positive("query_pre_attn_scalar", head_dim) ** -0.5
        total = self.size("num_hidden_layers", largest=_MOST_LAYERS)
        eos = get("eos_token_id")
        return ModelConfig(
            family=self.key,
            architecture=family.architecture,
            hidden_size=hidden,
            vocab_size=self.size("vocab_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_size=self.size("intermediate_size"),
            max_context=self.max_context(),
            layers=self.layers(total, head_dim),
            total_layers=total,
            norm=family.norm,
            norm_eps=self.positive(
                "layer_norm_eps" if family.norm == "layer" else "rms_norm_eps",
                1e-5 if family.norm == "layer" else 1e-6,
            ),
            norm_offset=family.norm_offset,
            pre_norm=family.pre_norm,
            post_norm=family.post_norm,
            qk_norm=self.qk_norm(),
            activation=self.activation(),
            gated=family.gated,
            parallel=family.parallel,
            biases=self.biases(),
            attention_scale=scale,
            attention_softcap=self.softcap("attn_logit_softcapping"),
            logit_softcap=self.softcap("final_logit_softcapping"),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            tied=bool(get("tie_word_embeddings", False)),
            bos_id=get("bos_token_id") if isinstance(get("bos_token_id"), int) else None,
            eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            source=dict(self.raw),
        )

    def activation(self) -> str:
        name = self.get("hidden_activation") or self.get("hidden_act", "silu")
        if name not in _ACTIVATIONS:
            raise self.wrong("hidden_act", f"one of {', '.join(_ACTIVATIONS)}", name)
        return _ACTIVATIONS[name]

    def qk_norm(self) -> str | None:
        if not self.get("qk_layernorm"):
            return self.family.qk_norm
        self.has("qk_layernorm", "q_norm", "k_norm")
        return self.family.qk_norm or "head"

    def biases(self) -> frozenset[str]:
        biases = set(self.family.biases)
        if self.get("attention_bias"):
            biases |= self.has("attention_bias", "q", "k", "v", "o")
        if self.get("mlp_bias"):
            biases |= self.has("mlp_bias", *(["gate"] if self.family.gated else []), "up", "down")
        return frozenset(biases)

    def has(self, option: str, *roles: str) -> set[str]:
        """`roles`, which a rule needs weights of; InputError where the family's layers lack one."""
        for role in roles:
            if role not in self.family.names:
                raise self.wrong(
                    option, f"false: a {self.key} layer has no {role} of its own", True
                )
        return set(roles)

    def softcap(self, name: str) -> float | None:
        return None if self.get(name) is None else self.positive(name)

    def max_context(self) -> int:
        """max_position_embeddings, stretched where the scaling exists to go beyond it."""
        context = self.size("max_position_embeddings", 2048)
        scaling = self.rope_parameters(None)
        kind, factor = self.rope_kind(scaling), scaling.get("factor")
        if kind in ("linear", "dynamic"):
            return int(context * self.positive("factor", values=scaling))
        if kind == "yarn" and factor:
            original = scaling.get("original_max_position_embeddings") or context
            return max(context, int(original * self.positive("factor", values=scaling)))
        return context

    # Layers

    def layers(self, total: int, head_dim: int) -> tuple[LayerConfig, ...]:
        types = self.layer_types(total)
        roped = self.roped(total) if self.key == "smollm3" else None
        ropes = {kind: self.rope(kind, head_dim) for kind in set(types)}
        window = self.window()
        return tuple(
            LayerConfig(
                layer=layer,
                window=window if types[layer] == "sliding_attention" else None,
                rope=ropes[types[layer]] if roped is None or roped[layer] else None,
            )
            for layer in range(total)
        )

    def window(self) -> int | None:
        gated = self.key in ("qwen2", "qwen3", "smollm3") and not self.get("use_sliding_window")
        if gated or self.get("sliding_window") is None:
            return None
        return self.size("sliding_window")

    def layer_types(self, total: int) -> list[str]:
        """ "sliding_attention" or "full_attention" for every layer, by the family's own rule."""
        if self.family.windows != "types":
            kind = "sliding" if self.family.windows == "all" else "full"
            return [f"{kind}_attention"] * total
        if self.get("layer_types") is not None:
            types = self.per_layer("layer_types", total)
            unknown = set(types) - {"sliding_attention", "full_attention"}
            if unknown:
                raise self.wrong("layer_types", "sliding_attention or full_attention", unknown)
            return list(types)
        return [
            "sliding_attention" if slides else "full_attention" for slides in self.slides(total)
        ]

    def slides(self, total: int) -> list[bool]:
        """Where a config without `layer_types` puts the window."""
        if self.key == "gemma2":
            return [layer % 2 == 0 for layer in range(total)]
        if self.key == "gemma3":
            period = self.size("sliding_window_pattern", 6)
            return [(layer + 1) % period != 0 for layer in range(total)]
        if self.key == "smollm3":
            return [not roped for roped in self.roped(total)]
        first = self.get("max_window_layers", 28)
        if not isinstance(first, int):
            raise self.wrong("max_window_layers", "a whole number", first)
        return [layer >= first for layer in range(total)]

    def roped(self, total: int) -> Sequence[Any]:
        """Which layers of SmolLM3 have a position embedding."""
        if self.get("no_rope_layers") is not None:
            return self.per_layer("no_rope_layers", total)
        interval = self.size("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(total)]

    def per_layer(self, name: str, total: int) -> Sequence[Any]:
        values = self.get(name)
        if not isinstance(values, list | tuple) or len(values) < total:
            raise self.wrong(name, f"a list of {total} entries", values)
        return values

    # Rotary embedding

    def rope_parameters(self, layer_type: str | None) -> dict[str, Any]:
        """The newer `rope_parameters` (nested by layer type in Gemma 3) or the older two keys."""
        nested = self.get("rope_parameters") or {}
        scaling = self.get("rope_scaling") or {}
        for name, value in (("rope_parameters", nested), ("rope_scaling", scaling)):
            if not isinstance(value, Mapping):
                raise self.wrong(name, "an object", value)
        if any(key.endswith("_attention") for key in nested):
            nested = nested.get(layer_type or "full_attention") or {}
        elif self.key == "gemma3" and layer_type == "sliding_attention":
            return {"rope_theta": self.get("rope_local_base_freq")}  # never scaled
        theta = {"rope_theta": self.get("rope_theta", 10000.0)}
        return theta | dict(scaling) | {k: v for k, v in nested.items() if v is not None}

    def rope_kind(self, values: Mapping[str, Any]) -> str:
        kind = values.get("rope_type", values.get("type", "default")) or "default"
        if self.key == "phi3" and kind in ("su", "yarn"):
            kind = "longrope"
        if kind not in _ROPE_KINDS:
            raise self.wrong("rope_type", f"one of {', '.join(_ROPE_KINDS)}", kind)
        return kind

    def rope(self, layer_type: str, head_dim: int) -> Rope:
        values = self.rope_parameters(layer_type)
        kind = self.rope_kind(values)
        partial = values.get("partial_rotary_factor", self.get("partial_rotary_factor")) or 1.0
        dim = int(
            head_dim
            * self.positive("partial_rotary_factor", 1.0, {"partial_rotary_factor": partial})
        )
        if dim < 2 or dim % 2 or dim > head_dim:
            raise self.wrong("partial_rotary_factor", f"an even part of {head_dim}", partial)
        context = self.size("max_position_embeddings", 2048)
        original = self.get("original_max_position_embeddings")
        original = original or values.get("original_max_position_embeddings") or context
        if kind == "dynamic":
            original = context
        return Rope(
            theta=self.positive("rope_theta", values=values),
            dim=dim,
            kind=kind,
            original_context=int(original),
            **self.scaling(kind, values, dim, int(original), context),
        )

    def scaling(self, kind: str, values: Mapping, dim: int, original: int, context: int) -> dict:
        if kind == "default":
            return {}
        if kind == "divisors":
            return {"divisors": self.divisors(values, "factors", dim)}
        grown = context / original if kind in ("yarn", "longrope") else None
        factor = self.positive("factor", grown, values)
        if kind == "llama3":
            low = self.positive("low_freq_factor", values=values)
            high = self.positive("high_freq_factor", values=values)
            if low >= high:
                raise self.wrong("high_freq_factor", f"more than low_freq_factor {low}", high)
            return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        if kind == "yarn":
            return {
                "factor": factor,
                "attention_factor": self.yarn_attention(values, factor),
                "beta_fast": self.positive(
                    "beta_fast", 32, {"beta_fast": values.get("beta_fast") or 32}
                ),
                "beta_slow": self.positive(
                    "beta_slow", 1, {"beta_slow": values.get("beta_slow") or 1}
                ),
                "truncate": bool(values.get("truncate", True)),
            }
        if kind == "longrope":
            stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return {
                "factor": factor,
                "attention_factor": self.positive("attention_factor", stretched, values),
                "divisors": self.divisors(values, "short_factor", dim),
                "long_divisors": self.divisors(values, "long_factor", dim),
            }
        return {"factor": factor}

    def yarn_attention(self, values: Mapping[str, Any], factor: float) -> float:
        def magnitude(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        over, under = values.get("mscale"), values.get("mscale_all_dim")
        ratio = magnitude(over) / magnitude(under) if over and under else magnitude(1.0)
        return self.positive("attention_factor", ratio, values)

    def divisors(self, values: Mapping[str, Any], name: str, dim: int) -> tuple[float, ...]:
        found = values.get(name)
        if not isinstance(found, list | tuple) or len(found) != dim // 2:
            raise self.wrong(name, f"a list of {dim // 2} numbers", found)
        return tuple(self.positive(name, values={name: value}) for value in found)
