"""What a config may say: the type and the range of every value that a decoder is made from.

`CONFIG` and `ROPE` are of the keys of a config.json, and hf_config.py reads none but through them;
`MODEL`, `LAYER` and `FREQUENCIES` are of what they become, and no ModelConfig holds anything else,
whoever makes it. Ranges are wider than any model in use, and narrower than what float32 angles and
scores or 64-bit sizes overflow at.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from engine.artifacts import MOST_LAYERS
from engine.errors import InputError

MOST = 1 << 24  # of anything counted: features, tokens, positions
MOST_HEAD = 1024  # as in csrc/cpu/attention.h
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "divisors")


class Kind(NamedTuple):
    """Of a value: what it is in words, and whether one is of it."""

    expected: str
    holds: Callable[[Any], bool]


def whole(low: int, high: int) -> Kind:
    return Kind(
        f"a whole number from {low} to {high}", lambda v: type(v) is int and low <= v <= high
    )


def number(low: float, high: float) -> Kind:
    """Written so that NaN, which fails every comparison, is refused too."""
    return Kind(
        f"a number from {low:g} to {high:g}",
        lambda v: type(v) in (int, float) and low <= v <= high,
    )


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def list_of(kind: Kind, what: str) -> Kind:
    return Kind(
        f"a list of {what}", lambda v: isinstance(v, list | tuple) and all(map(kind.holds, v))
    )


def either(*kinds: Kind) -> Kind:
    return Kind(
        " or ".join(kind.expected for kind in kinds), lambda v: any(kind.holds(v) for kind in kinds)
    )


NONE = Kind("null", lambda v: v is None)
FLAG = Kind("true or false", lambda v: type(v) is bool)
OBJECT = Kind("an object", lambda v: isinstance(v, Mapping))
SIZE, LAYERS, HEAD = whole(1, MOST), whole(1, MOST_LAYERS), whole(1, MOST_HEAD)
TOKEN = whole(-1, 1 << 31)
THETA, FACTOR, SCALE = number(1, 1e12), number(1e-3, 1e4), number(1e-6, 1e6)
ORIGINAL, TURNS, MAGNITUDE = whole(2, MOST), number(1e-3, 1e4), number(0, 100)
EPS, CAP = number(1e-20, 1), number(1e-3, 1e6)
DIVISORS = list_of(SCALE, "numbers from 1e-06 to 1e+06")
WINDOWS = list_of(
    one_of("sliding_attention", "full_attention"), "sliding_attention or full_attention"
)

CONFIG: dict[str, Kind] = {
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "vocab_size": SIZE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": SIZE,
    "num_key_value_heads": SIZE,
    "head_dim": HEAD,
    "max_position_embeddings": SIZE,
    "original_max_position_embeddings": ORIGINAL,
    "rms_norm_eps": EPS,
    "layer_norm_eps": EPS,
    "query_pre_attn_scalar": SCALE,
    "attn_logit_softcapping": CAP,
    "final_logit_softcapping": CAP,
    "hidden_act": one_of(*ACTIVATIONS),
    "hidden_activation": one_of(*ACTIVATIONS),
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "mlp_bias": FLAG,
    "qk_layernorm": FLAG,
    "use_bidirectional_attention": FLAG,
    "use_sliding_window": FLAG,
    "is_causal": FLAG,
    "sliding_window": SIZE,
    "sliding_window_pattern": SIZE,
    "max_window_layers": whole(0, MOST),
    "layer_types": WINDOWS,
    "no_rope_layers": list_of(whole(0, 1), "0 or 1"),
    "no_rope_layer_interval": SIZE,
    "rope_parameters": OBJECT,
    "rope_scaling": OBJECT,
    "rope_theta": THETA,
    "rope_local_base_freq": THETA,
    "partial_rotary_factor": number(1e-3, 1),
    "bos_token_id": TOKEN,
    "eos_token_id": either(TOKEN, list_of(TOKEN, "token ids")),
}
# Of `rope_parameters` or `rope_scaling`.
ROPE: dict[str, Kind] = {
    "full_attention": OBJECT,
    "sliding_attention": OBJECT,
    "rope_type": one_of(*ROPE_KINDS),
    "rope_theta": THETA,
    "partial_rotary_factor": CONFIG["partial_rotary_factor"],
    "original_max_position_embeddings": ORIGINAL,
    "factor": FACTOR,
    "attention_factor": SCALE,
    "low_freq_factor": TURNS,
    "high_freq_factor": TURNS,
    "beta_fast": TURNS,
    "beta_slow": TURNS,
    "mscale": MAGNITUDE,
    "mscale_all_dim": MAGNITUDE,
    "truncate": FLAG,
    "factors": DIVISORS,
    "short_factor": DIVISORS,
    "long_factor": DIVISORS,
}

MODEL: dict[str, Kind] = {
    "hidden_size": SIZE,
    "vocab_size": SIZE,
    "heads": SIZE,
    "kv_heads": SIZE,
    "head_dim": HEAD,
    "ffn_size": SIZE,
    "max_context": SIZE,
    "total_layers": LAYERS,
    "norm": one_of("rms", "layer"),
    "norm_eps": EPS,
    "norm_offset": number(0, 1),
    "qk_norm": either(NONE, one_of("head", "all")),
    "activation": one_of(*ACTIVATIONS.values()),
    "attention_scale": SCALE,
    "attention_softcap": either(NONE, CAP),
    "logit_softcap": either(NONE, CAP),
    "embedding_scale": number(1, MOST),
    "bos_id": either(NONE, TOKEN),
    "eos_ids": list_of(TOKEN, "token ids"),
}
LAYER: dict[str, Kind] = {"layer": whole(0, MOST_LAYERS - 1), "window": either(NONE, SIZE)}
FREQUENCIES: dict[str, Kind] = {
    "theta": THETA,
    "dim": SIZE,
    "kind": one_of(*ROPE_KINDS),
    "factor": FACTOR,
    "original_context": whole(0, MOST),
    "attention_factor": SCALE,
    "low_freq_factor": TURNS,
    "high_freq_factor": TURNS,
    "beta_fast": TURNS,
    "beta_slow": TURNS,
    "divisors": DIVISORS,
    "long_divisors": DIVISORS,
}


def check(value: Any, kinds: Mapping[str, Kind]) -> None:
    """InputError for the first attribute of `value` that is not of its kind."""
    for name, kind in kinds.items():
        if not kind.holds(found := getattr(value, name)):
            raise wrong(name, kind.expected, found)


def require(holds: bool, name: str, expected: str, found: Any) -> None:
    """InputError unless it `holds`: for rules that join several values."""
    if not holds:
        raise wrong(name, expected, found)


def wrong(name: str, expected: str, found: Any) -> InputError:
    return InputError(f"{name}: expected {expected}, found {found!r:.200}")
