"""The architectures, as data: how tensors are named and what differs from a Llama.

A *role* is what a tensor does in a layer ("q", "down", "attn_norm"); `Family.names` gives its
Hugging Face name, and `Family.fused` says which roles a stored matrix holds one after another.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.architecture.config import ModelConfig
from engine.errors import InputError

_LLAMA = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MLP = ("gate", "up", "gate_up", "down")  # roles; gate and up may be one matrix
_QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_GEMMA = _LLAMA | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_OLMO2 = {role: name for role, name in _LLAMA.items() if not role.endswith("norm")} | {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_PHI2 = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.dense",
    "q_norm": "self_attn.q_layernorm",
    "k_norm": "self_attn.k_layernorm",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_PHI3 = {
    "attn_norm": "input_layernorm",
    "qkv": "self_attn.qkv_proj",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": "mlp.gate_up_proj",
    "down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Family:
    """One architecture. `defaults` are the config values a checkpoint may leave out."""

    architecture: str
    names: Mapping[str, str] = field(default_factory=lambda: _LLAMA)
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    final_norm: str = "model.norm"
    norm: str = "rms"
    norm_offset: float = 0.0
    pre_norm: bool = True
    post_norm: bool = False
    qk_norm: str | None = None
    gated: bool = True
    parallel: bool = False
    biases: frozenset[str] = frozenset()
    scaled_embedding: bool = False
    windows: str = "none"  # "none"; "all": every layer has the window; "types": by layer_types
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def apart(self, role: str) -> bool:
        """Whether the matrix of `role` is stored as one of its own."""
        return all(role not in roles for roles in self.fused.values())


_PHI2_BIASES = frozenset({"q", "k", "v", "o", "up", "down", "head"})
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        windows="all",
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "qwen2": Family("Qwen2ForCausalLM", biases=frozenset("qkv"), windows="types"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        names=_LLAMA | _QK_NORM,
        qk_norm="head",
        windows="types",
        defaults={"head_dim": 128},
    ),
    "phi2": Family(
        "PhiForCausalLM",
        names=_PHI2,
        final_norm="model.final_layernorm",
        norm="layer",
        gated=False,
        parallel=True,
        biases=_PHI2_BIASES,
        defaults={"hidden_act": "gelu_new", "partial_rotary_factor": 0.5},
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        names=_PHI3,
        fused={"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")},
        windows="all",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        names=_GEMMA,
        norm_offset=1.0,
        post_norm=True,
        scaled_embedding=True,
        windows="types",
        defaults=_GEMMA_DEFAULTS
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "gemma3": Family(
        "Gemma3ForCausalLM",
        names=_GEMMA | _QK_NORM,
        norm_offset=1.0,
        post_norm=True,
        qk_norm="head",
        scaled_embedding=True,
        windows="types",
        defaults=_GEMMA_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        names=_OLMO2 | _QK_NORM,
        pre_norm=False,
        post_norm=True,
        qk_norm="all",
        defaults={"rms_norm_eps": 1e-5},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        windows="types",
        defaults={
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
    ),
}


def model_type(family: str) -> str:
    """What transformers calls a family."""
    return {"phi2": "phi", "gemma3": "gemma3_text"}.get(family, family)


def family_of(architecture: str, where: str) -> str:
    """The key in FAMILIES of a Hugging Face class name; InputError with the list otherwise."""
    for key, family in FAMILIES.items():
        if family.architecture == architecture:
            return key
    known = ", ".join(family.architecture for family in FAMILIES.values())
    raise InputError(f"{where}: architecture {architecture!r} is not supported; known are {known}")


def has_bias(config: ModelConfig, role: str) -> bool:
    """Whether a layer's matrix or norm has one."""
    return role in config.biases or (role.endswith("norm") and config.norm == "layer")


def layer_tensors(config: ModelConfig, layer: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Stored role -> (name, shape) of a layer's tensors as Hugging Face directories have them."""
    family = FAMILIES[config.family]
    tensors = {}
    for role, name in family.names.items():
        if role in ("q_norm", "k_norm") and config.qk_norm is None:
            continue
        parts = family.fused.get(role, (role,))
        shapes = [role_shape(config, part) for part in parts]
        prefix = f"model.layers.{layer}.{name}"
        outputs = sum(shape[0] for shape in shapes)
        tensors[role] = (f"{prefix}.weight", (outputs, *shapes[0][1:]))
        if has_bias(config, role):
            tensors[f"{role}.bias"] = (f"{prefix}.bias", (outputs,))
    return tensors


@dataclass(frozen=True)
class Part:
    """One role's tensor in a layer: its own name, and the fused tensor that may hold it instead.

    `fused` is (name, shape) of that tensor, None in families that keep the role apart; its rows
    from `first` on are the part's. Packed directories never fuse.
    """

    name: str
    shape: tuple[int, ...]
    fused: tuple[str, tuple[int, ...]] | None = None
    first: int = 0

    def stored(self, names: Collection[str]) -> tuple[str, tuple[int, ...]]:
        """(name, shape) of the tensor that holds it where `names` are those there are."""
        if self.fused is None or (self.name in names and self.fused[0] not in names):
            return self.name, self.shape
        return self.fused


def layer_parts(config: ModelConfig, layer: int) -> dict[str, Part]:
    """Role -> its part of a layer, q, k, v, gate and up one by one; biases are "q.bias"."""
    fused = FAMILIES[config.family].fused
    parts = {}
    for stored, (name, shape) in layer_tensors(config, layer).items():
        role, _, bias = stored.partition(".")
        first = 0
        for part in fused.get(role, ()):
            rows = role_shape(config, part)[0]
            own = f"model.layers.{layer}.{_LLAMA[part]}.{bias or 'weight'}"
            key = f"{part}.{bias}" if bias else part
            parts[key] = Part(own, (rows, *shape[1:]), (name, shape), first)
            first += rows
        if role not in fused:
            parts[stored] = Part(name, shape)
    return parts


def all_tensors(
    config: ModelConfig, names: Collection[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of all tensors of the whole model, where `names` are those there are."""
    yield from outer_tensors(config).values()
    for layer in range(config.total_layers):
        stored = (part.stored(names) for part in layer_parts(config, layer).values())
        yield from dict.fromkeys(stored)


def check_v_bits(config: ModelConfig, bits: int, found: int) -> None:
    """InputError for a v of other bits than the `bits` of a matrix that it is stored in."""
    if found != bits and not FAMILIES[config.family].apart("v"):
        raise InputError(
            f"v: expected {bits}, as {config.family} stores q, k and v as one matrix, found {found}"
        )


def outer_tensors(config: ModelConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Role -> (name, shape) of what is not in a layer: embedding, final norm, head."""
    norm = FAMILIES[config.family].final_norm
    tensors = {
        "embedding": ("model.embed_tokens.weight", (config.vocab_size, config.hidden_size)),
        "norm": (f"{norm}.weight", (config.hidden_size,)),
    }
    if config.norm == "layer":
        tensors["norm.bias"] = (f"{norm}.bias", (config.hidden_size,))
    if not config.tied:
        tensors["head"] = ("lm_head.weight", (config.vocab_size, config.hidden_size))
    if "head" in config.biases:
        tensors["head.bias"] = ("lm_head.bias", (config.vocab_size,))
    return tensors


def role_shape(config: ModelConfig, role: str) -> tuple[int, ...]:
    """(N, K) of a matrix role, or (N,) of a norm."""
    queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
    if role in ("q_norm", "k_norm"):
        whole = queries if role == "q_norm" else keys
        return (config.head_dim if config.qk_norm == "head" else whole,)
    if role.endswith("norm"):
        return (config.hidden_size,)
    return {
        "q": (queries, config.hidden_size),
        "k": (keys, config.hidden_size),
        "v": (keys, config.hidden_size),
        "o": (config.hidden_size, queries),
        "gate": (config.ffn_size, config.hidden_size),
        "up": (config.ffn_size, config.hidden_size),
        "down": (config.hidden_size, config.ffn_size),
    }[role]
