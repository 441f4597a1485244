"""GGUF metadata -> the config.json that the model was converted from, as far as the file tells.

llama.cpp fixes some settings by architecture and stores no key for them (SmolLM3's layers without
RoPE, Gemma's window pattern and attention scale); those are repeated here.
"""

import math
from ctypes import c_float
from typing import Any

from engine.architecture.config import Rope, yarn_attention
from engine.architecture.families import FAMILIES, model_type
from engine.checkpoint.gguf_file import GgufFile, GgufTensor
from engine.checkpoint.gguf_names import (
    ARCHITECTURES,
    EMBEDDING,
    END_TOKENS,
    HEAD,
    LONGROPE_DIVISORS,
    ROPE_DIVISORS,
)
from engine.errors import InputError

_OTHER_KINDS = ("adapter", "imatrix", "mmproj")  # general.type of what goes with a model
_CONTROL = 3  # tokenizer.ggml.token_type
WINDOW_PERIODS = {"gemma2": 2, "gemma3": 6}  # the last of so many layers sees everything
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # scores scaled by D / H, in the others by E
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192


def family_of(file: GgufFile) -> str:
    """The key in FAMILIES; InputError names the architecture and those known."""
    parts = file.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise InputError(
            f"{file.path}: one of {parts} parts; join them with `llama-gguf-split --merge` first"
        )
    kind = file.metadata.get("general.type")
    if kind in _OTHER_KINDS:
        raise InputError(f"{file.path}: expected a model, found a GGUF of the type {kind!r}")
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(
            f"{file.path}: architecture {architecture!r:.200} is not supported; known are {known}"
        )
    if architecture == "llama" and "llama.attention.sliding_window" in file.metadata:
        return "mistral"
    return architecture


def config_from_gguf(file: GgufFile, family: str) -> dict[str, Any]:
    """The keys of a config.json; InputError where metadata is absent or of the wrong kind."""
    fields = _Fields(file)
    hidden, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", hidden // heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.path}: keys and values of different length are not supported")
    if fields.get("attention.causal") is False:
        raise fields.wrong("attention.causal", "true (a causal decoder)", False)
    layer_norm = FAMILIES[family].norm == "layer"
    stored_norm = "layer_norm" if layer_norm else "layer_norm_rms"
    embedding = fields.tensor(f"{EMBEDDING}.weight")
    config = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": model_type(family),
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": fields.integer("feed_forward_length"),
        "num_hidden_layers": _layer_count(fields),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": fields.integer("context_length"),
        "layer_norm_eps" if layer_norm else "rms_norm_eps": fields.number(
            f"attention.{stored_norm}_epsilon"
        ),
        "hidden_act": FAMILIES[family].defaults.get("hidden_act", "silu"),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "tie_word_embeddings": f"{HEAD}.weight" not in file.tensors,
        "bos_token_id": fields.token("bos"),
        "eos_token_id": _end_tokens(fields),
    }
    if embedding.type.dtype is not None:
        config["torch_dtype"] = embedding.type.dtype
    return config | _rope(fields, head_dim) | _by_family(fields, family, config)


def _by_family(fields: "_Fields", family: str, config: dict[str, Any]) -> dict[str, Any]:
    window = fields.get("attention.sliding_window")
    if window is None and family == "gemma2":  # as llama.cpp; the first files lack the key
        window = 4096
    window = window or None
    if family in ("gemma2", "gemma3"):
        return _gemma(fields, family, config, window)
    if family in ("mistral", "phi3"):
        return {"sliding_window": window}
    if window is not None and family == "olmo2":
        raise InputError(f"{fields.file.path}: OLMo with a sliding window (3) is not supported")
    return {}


def _gemma(
    fields: "_Fields", family: str, config: dict[str, Any], window: int | None
) -> dict[str, Any]:
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    largest = layers == _GEMMA_27B_LAYERS[family]
    slides = _slides(fields, family, layers) if window else [False] * layers
    kinds = ["sliding_attention" if each else "full_attention" for each in slides]
    extra = {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": window,
        "layer_types": kinds,
        "query_pre_attn_scalar": (
            config["hidden_size"] // config["num_attention_heads"] if largest else head_dim
        ),
    }
    if family == "gemma2":
        return extra | {
            "attn_logit_softcapping": fields.number("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": fields.number("final_logit_softcapping", 30.0),
        }
    cap = fields.number("final_logit_softcapping", 0.0) or None  # llama.cpp's saver writes a 0
    return extra | {
        "rope_local_base_freq": fields.number("rope.freq_base_swa", 10000.0),
        "final_logit_softcapping": cap,
    }


def _slides(fields: "_Fields", family: str, layers: int) -> list[bool]:
    """Which layers have the window: a list of them all, or the period of those without."""
    listed = fields.get("attention.sliding_window_pattern")
    if isinstance(listed, list):
        if len(listed) < layers or set(map(type, listed)) - {bool, int}:
            raise fields.wrong("attention.sliding_window_pattern", f"{layers} booleans", listed)
        return [bool(each) for each in listed[:layers]]
    period = fields.integer("attention.sliding_window_pattern", WINDOW_PERIODS[family])
    return [(layer + 1) % period != 0 for layer in range(layers)]


def _layer_count(fields: "_Fields") -> int:
    count = fields.integer("block_count")
    stored = {name.split(".")[1] for name in fields.file.tensors if name.startswith("blk.")}
    if count != len(stored):
        raise InputError(
            f"{fields.file.path}: metadata says {count} layers, but it has tensors of {len(stored)}"
        )
    return count


def _end_tokens(fields: "_Fields") -> list[int]:
    named = (fields.token(name) for name in ("eos", "eot", "eom"))
    ids = {index for index in named if index is not None}
    tokens = fields.file.metadata.get("tokenizer.ggml.tokens")
    kinds = fields.file.metadata.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and isinstance(kinds, list):
        control = [i for i, kind in enumerate(kinds[: len(tokens)]) if kind == _CONTROL]
        ids |= {i for i in control if tokens[i] in END_TOKENS}
    return sorted(ids)


def _rope(fields: "_Fields", head_dim: int) -> dict[str, Any]:
    theta = fields.number("rope.freq_base", 10000.0)
    dim = fields.integer("rope.dimension_count", head_dim)
    part = dim / head_dim
    if int(head_dim * part) != dim:
        part = math.nextafter(part, 1)
    rope: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": part}
    kind = fields.get("rope.scaling.type")
    factor = fields.number("rope.scaling.factor", fields.get("rope.scale_linear") or 0.0) or 1.0
    if LONGROPE_DIVISORS[1] in fields.file.tensors:
        scaling = _longrope(fields)
        rope["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    elif ROPE_DIVISORS in fields.file.tensors:
        scaling = _by_divisors(fields.values(ROPE_DIVISORS), theta, dim)
    elif kind == "yarn":
        scaling = _yarn(fields, factor)
    elif kind in (None, "linear") and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    elif kind in (None, "none", "linear"):
        return rope
    else:
        raise fields.wrong("rope.scaling.type", "none, linear or yarn", kind)
    return rope | {"rope_scaling": scaling}


def _longrope(fields: "_Fields") -> dict[str, Any]:
    short, long = (fields.values(name) for name in LONGROPE_DIVISORS)
    scaling = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
    }
    scaling["attention_factor"] = fields.number("rope.scaling.attn_factor", 1.0)
    return scaling


def _yarn(fields: "_Fields", factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": fields.integer(
            "rope.scaling.original_context_length", fields.integer("context_length")
        ),
        "beta_fast": fields.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": fields.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if fields.get("rope.scaling.attn_factor") is not None:
        times = fields.number("rope.scaling.attn_factor")
        scaling["attention_factor"] = times * yarn_attention(factor)
    elif fields.get("rope.scaling.yarn_attn_factor") is not None:  # its converter's
        scaling["attention_factor"] = fields.number("rope.scaling.yarn_attn_factor")
    return scaling


def _by_divisors(divisors: list[float], theta: float, dim: int) -> dict[str, Any]:
    """The llama3 scaling that the divisors came from; failing that, the divisors themselves.

    Naming the scaling keeps the config one that transformers knows.
    """
    import torch

    from engine.architecture.rope import inverse_frequencies

    scaling = {"rope_type": "llama3", "factor": max(divisors), **_LLAMA3}
    low, high = _LLAMA3.values()
    try:
        plain = Rope(theta, dim)
        guess = Rope(theta, dim, "llama3", max(divisors), _LLAMA3_CONTEXT, 1.0, low, high)
    except InputError:  # no such scaling; whether the divisors can be is for the config to say
        return {"rope_type": "divisors", "factors": divisors}
    if len(divisors) == dim // 2:
        found = inverse_frequencies(plain, 1) / inverse_frequencies(guess, 1)
        if torch.allclose(found, torch.tensor(divisors), rtol=1e-5, atol=0):
            return scaling | {"original_max_position_embeddings": _LLAMA3_CONTEXT}
    return {"rope_type": "divisors", "factors": divisors}


class _Fields:
    """Checked look-ups; keys are given without the architecture in front."""

    def __init__(self, file: GgufFile) -> None:
        self.file = file
        self._prefix = file.metadata["general.architecture"]

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self._prefix}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number above 0, or a list of one such number repeated (an entry a layer)."""
        value = self.get(key)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise self.wrong(key, "a whole number above 0", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if type(value) is bool or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.wrong(key, "a number below 1e30 in magnitude", value)
        return _decimal(value)

    def token(self, name: str) -> int | None:
        value = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return value if type(value) is int else None

    def tensor(self, name: str) -> GgufTensor:
        if name not in self.file.tensors:
            raise InputError(f"{self.file.path}: there is no tensor {name!r}")
        return self.file.tensors[name]

    def values(self, name: str) -> list[float]:
        """The numbers of a float32 vector."""
        tensor = self.tensor(name)
        if tensor.type.dtype != "float32" or len(tensor.shape) != 1:
            raise InputError(f"{self.file.path}: tensor {name!r}: expected a vector of F32")
        count = tensor.shape[0]
        return [_decimal(value) for value in self.file.floats(tensor.offset, count)]

    def wrong(self, key: str, expected: str, found: Any) -> InputError:
        return InputError(
            f"{self.file.path}: metadata {self._prefix}.{key}: expected {expected}, "
            f"found {found!r:.200}"
        )


def _decimal(value: float) -> float:
    """The shortest decimal that a float32 may stand for: 1e-05, not 9.999999747378752e-06."""
    for digits in range(1, 9):
        short = float(f"{value:.{digits}g}")
        if c_float(short).value == value:
            return short
    return float(value)
