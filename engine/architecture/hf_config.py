"""A Hugging Face `config.json` (or the same keys, rebuilt from GGUF metadata) -> ModelConfig."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from engine.architecture import schema
from engine.architecture.config import LayerConfig, ModelConfig, Rope, yarn_attention
from engine.architecture.families import FAMILIES, Family, family_of, model_type
from engine.errors import InputError


def from_hf(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Reads the config of a supported architecture; every value is checked as schema.py says.

    `where` names the file in errors. InputError for an unknown architecture and for a value that
    is absent, of the wrong kind, out of range or at odds with another.
    """
    architectures, kind = raw.get("architectures"), raw.get("model_type")
    named = {model_type(family): family for family in FAMILIES}
    if isinstance(architectures, list | tuple) and architectures:
        key = family_of(str(architectures[0]), where)
    elif architectures in (None, []) and isinstance(kind, str) and kind in named:
        key = named[kind]
    else:
        raise InputError(f"{where}: expected a list 'architectures', found {architectures!r}")
    try:
        return _Reader(raw, key).model()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


class _Reader:
    """One config being read: looks values up with the family's defaults, and checks them."""

    def __init__(self, raw: Mapping[str, Any], key: str) -> None:
        self.raw, self.key = raw, key
        self.family: Family = FAMILIES[key]

    def get(self, name: str, default: Any = None) -> Any:
        """A key's value, null too; where there is none the family's default or the one given."""
        if name not in self.raw:
            return self.family.defaults.get(name, default)
        return _checked(name, self.raw[name], schema.CONFIG[name])

    def need(self, name: str, default: Any = None) -> Any:
        """The same where null says as little as no key."""
        value = self.get(name)
        return _needed(name, default if value is None else value, schema.CONFIG[name])

    def model(self) -> ModelConfig:
        family, get = self.family, self.get
        if get("use_bidirectional_attention"):
            raise schema.wrong("use_bidirectional_attention", "false (a causal decoder)", True)
        if get("is_causal") is False:
            raise schema.wrong("is_causal", "true (a causal decoder)", False)
        hidden, heads = self.need("hidden_size"), self.need("num_attention_heads")
        kv_heads = self.need("num_key_value_heads", heads)
        head_dim = self.need("head_dim", max(hidden // heads, 1))
        if heads % kv_heads:
            raise schema.wrong("num_key_value_heads", f"a divisor of {heads} heads", kv_heads)
        total = self.need("num_hidden_layers")
        eps, common = ("layer_norm_eps", 1e-5) if family.norm == "layer" else ("rms_norm_eps", 1e-6)
        eos = get("eos_token_id")
        return ModelConfig(
            family=self.key,
            architecture=family.architecture,
            hidden_size=hidden,
            vocab_size=self.need("vocab_size"),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_size=self.need("intermediate_size"),
            max_context=self.max_context(),
            layers=self.layers(total, head_dim),
            total_layers=total,
            norm=family.norm,
            norm_eps=self.need(eps, common),
            norm_offset=family.norm_offset,
            pre_norm=family.pre_norm,
            post_norm=family.post_norm,
            qk_norm=self.qk_norm(),
            activation=self.activation(),
            gated=family.gated,
            parallel=family.parallel,
            biases=self.biases(),
            attention_scale=self.need("query_pre_attn_scalar", head_dim) ** -0.5,
            attention_softcap=get("attn_logit_softcapping"),
            logit_softcap=get("final_logit_softcapping"),
            embedding_scale=hidden**0.5 if family.scaled_embedding else 1.0,
            tied=bool(get("tie_word_embeddings", False)),
            bos_id=get("bos_token_id"),
            eos_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            source=dict(self.raw),
        )

    def activation(self) -> str:
        return schema.ACTIVATIONS[self.get("hidden_activation") or self.need("hidden_act", "silu")]

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
                raise schema.wrong(
                    option, f"false: a {self.key} layer has no {role} of its own", True
                )
        return set(roles)

    def max_context(self) -> int:
        """max_position_embeddings, stretched where the scaling exists to go beyond it."""
        context = self.need("max_position_embeddings", 2048)
        if self.key == "gemma3":  # names what its scaling has come to
            return context
        rope = self.rope_parameters(None)
        kind, factor = self.rope_kind(rope), rope.get("factor")
        if kind in ("linear", "dynamic"):
            return int(context * rope.need("factor"))
        if kind == "yarn" and factor is not None:
            return max(
                context, int(rope.need("original_max_position_embeddings", context) * factor)
            )
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
        return None if gated else self.get("sliding_window")

    def layer_types(self, total: int) -> list[str]:
        """ "sliding_attention" or "full_attention" for every layer, by the family's own rule."""
        if self.family.windows != "types":
            kind = "sliding" if self.family.windows == "all" else "full"
            return [f"{kind}_attention"] * total
        if self.get("layer_types") is not None:
            return list(self.per_layer("layer_types", total))
        return [
            "sliding_attention" if slides else "full_attention" for slides in self.slides(total)
        ]

    def slides(self, total: int) -> list[bool]:
        """Where a config without `layer_types` puts the window."""
        if self.key == "gemma2":
            return [layer % 2 == 0 for layer in range(total)]
        if self.key == "gemma3":
            period = self.need("sliding_window_pattern", 6)
            return [(layer + 1) % period != 0 for layer in range(total)]
        if self.key == "smollm3":
            return [not roped for roped in self.roped(total)]
        first = self.need("max_window_layers", 28)
        return [layer >= first for layer in range(total)]

    def roped(self, total: int) -> Sequence[Any]:
        """Which layers of SmolLM3 have a position embedding."""
        if self.get("no_rope_layers") is not None:
            return self.per_layer("no_rope_layers", total)
        interval = self.need("no_rope_layer_interval")
        return [(layer + 1) % interval != 0 for layer in range(total)]

    def per_layer(self, name: str, total: int) -> Sequence[Any]:
        values = self.get(name)
        # More types than layers are left where a layer was dropped, whichever that was.
        if len(values) < total or (name == "layer_types" and len(values) > total):
            raise schema.wrong(name, f"a list of {total} entries", values)
        return values

    # Rotary embedding

    def rope_parameters(self, layer_type: str | None) -> "_Values":
        """The newer `rope_parameters` (nested by layer type in Gemma 3) or the older two keys."""
        nested = _Values(self.get("rope_parameters") or {})
        scaling = self.get("rope_scaling") or {}
        if any(key.endswith("_attention") for key in nested.values):
            nested = _Values(nested.get(layer_type or "full_attention") or {})
        elif self.key == "gemma3" and layer_type == "sliding_attention":
            return _Values({"rope_theta": self.get("rope_local_base_freq")})  # never scaled
        theta = {"rope_theta": self.get("rope_theta", 10000.0)}
        given = {key: value for key, value in nested.values.items() if value is not None}
        if scaling and given and _spelt(theta | dict(scaling)) != _spelt(theta | given):
            # transformers takes it in the place of all that rope_parameters says, theta too
            raise schema.wrong("rope_scaling", "none beside another rope_parameters", scaling)
        return _Values(theta | dict(scaling) | given)

    def rope_kind(self, rope: "_Values") -> str:
        kind = rope.values.get("rope_type", rope.values.get("type")) or "default"
        if self.key == "phi3" and kind in ("su", "yarn"):
            return "longrope"
        return _checked("rope_type", kind, schema.ROPE["rope_type"])

    def rope(self, layer_type: str, head_dim: int) -> Rope:
        rope = self.rope_parameters(layer_type)
        kind = self.rope_kind(rope)
        partial = rope.get("partial_rotary_factor")
        partial = self.need("partial_rotary_factor", 1.0) if partial is None else partial
        dim = int(head_dim * partial)
        if dim < 2 or dim % 2:
            raise schema.wrong("partial_rotary_factor", f"an even part of {head_dim}", partial)
        context = self.need("max_position_embeddings", 2048)
        original = self.get("original_max_position_embeddings")
        if original is None:
            original = rope.need("original_max_position_embeddings", max(context, 2))
        if kind == "dynamic":
            original = max(context, 2)
        theta, scaling = rope.need("rope_theta"), self.scaling(kind, rope, dim, original, context)
        return Rope(theta, dim, kind, original_context=original, **scaling)

    def scaling(
        self, kind: str, rope: "_Values", dim: int, original: int, context: int
    ) -> dict[str, Any]:
        if kind == "default":
            return {}
        if kind == "divisors":
            return {"divisors": rope.divisors("factors", dim)}
        grown = context / original if kind in ("yarn", "longrope") else None
        factor = rope.need("factor", grown)
        if kind == "llama3":
            low, high = rope.need("low_freq_factor"), rope.need("high_freq_factor")
            return {"factor": factor, "low_freq_factor": low, "high_freq_factor": high}
        if kind == "yarn":
            return {
                "factor": factor,
                "attention_factor": self.yarn_attention(rope, factor),
                "beta_fast": rope.need("beta_fast", 32.0),
                "beta_slow": rope.need("beta_slow", 1.0),
                "truncate": rope.need("truncate", True),
            }
        if kind == "longrope":
            stretched = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
            return {
                "factor": factor,
                "attention_factor": rope.need("attention_factor", stretched),
                "divisors": rope.divisors("short_factor", dim),
                "long_divisors": rope.divisors("long_factor", dim),
            }
        return {"factor": factor}

    def yarn_attention(self, rope: "_Values", factor: float) -> float:
        over, under, usual = rope.get("mscale"), rope.get("mscale_all_dim"), yarn_attention(factor)
        if over and under:
            usual = yarn_attention(factor, over) / yarn_attention(factor, under)
        return rope.need("attention_factor", usual)


class _Values:
    """Of one kind of rotary embedding, by key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, name: str) -> Any:
        return _checked(name, self.values.get(name), schema.ROPE[name])

    def need(self, name: str, default: Any = None) -> Any:
        value = self.get(name)
        return _needed(name, default if value is None else value, schema.ROPE[name])

    def divisors(self, name: str, dim: int) -> tuple[float, ...]:
        found = self.need(name)
        if len(found) != dim // 2:
            raise schema.wrong(name, f"a list of {dim // 2} numbers", found)
        return tuple(map(float, found))


def _spelt(rope: Mapping[str, Any]) -> dict[str, Any]:
    """One way of the several to write the same."""
    kind = rope.get("rope_type", rope.get("type")) or "default"
    found = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return found | {"rope_type": kind}


def _checked(name: str, value: Any, kind: schema.Kind) -> Any:
    """The value, which may be null."""
    return None if value is None else _needed(name, value, kind)


def _needed(name: str, value: Any, kind: schema.Kind) -> Any:
    if not kind.holds(value):
        raise schema.wrong(name, kind.expected, value)
    return value
