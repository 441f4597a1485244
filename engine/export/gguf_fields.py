"""A config as GGUF metadata, and whether what llama.cpp makes of that is the model.

Keys and RoPE tensors are those of llama.cpp's own converter. What has no key there is fixed by the
architecture (SmolLM3's layers without RoPE, Gemma's attention scale): `require_said` reads the
metadata back as `engine.checkpoint.gguf_config` does and compares.
"""

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import LayerConfig, ModelConfig, Rope, yarn_attention
from engine.architecture.families import FAMILIES
from engine.architecture.hf_config import from_hf
from engine.architecture.rope import inverse_frequencies
from engine.checkpoint.gguf_blocks import BLOCK_TYPES
from engine.checkpoint.gguf_config import WINDOW_PERIODS, config_from_gguf, family_of
from engine.checkpoint.gguf_file import GgufFile, GgufTensor
from engine.checkpoint.gguf_names import ARCHITECTURES, LONGROPE_DIVISORS, ROPE_DIVISORS
from engine.export.tensors import Unsupported

# What llama.cpp's architectures have no tensor or no room for, by the families that do.
_DIVISORS = ("llama", "mistral", "phi3")  # of rotary frequencies
_BIASED = ("llama", "mistral")  # where the family has none
_PARTIAL = ("phi2", "phi3")  # rotation of a part of a head
_SQUARE = ("qwen2", "olmo2", "phi2", "phi3")  # those whose heads are as wide as the stream together
_WHOLE = ("mistral", "phi3")  # families whose window llama.cpp leaves out
_F32 = BLOCK_TYPES[0]
# Of a config, what a GGUF need not repeat: names, and what its tensors or its tokenizer say.
_OTHERWISE = {"family", "architecture", "layers", "total_layers", "source", "vocab_size"}
_OTHERWISE |= {"bos_id", "eos_ids", "max_context"}


def architecture(config: ModelConfig) -> str:
    """What GGUF calls it; Mistral is a Llama there."""
    return config.family if config.family in ARCHITECTURES else "llama"


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """The metadata under the architecture's name, which is left out of the keys."""
    norm = "layer_norm" if config.norm == "layer" else "layer_norm_rms"
    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "block_count": len(config.layers),
        "context_length": config.source.get("max_position_embeddings") or config.max_context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        f"attention.{norm}_epsilon": config.norm_eps,
    }
    if config.attention_softcap is not None:
        fields["attn_logit_softcapping"] = config.attention_softcap
    if config.logit_softcap is not None:
        fields["final_logit_softcapping"] = config.logit_softcap
    return fields | _window_fields(config) | _rope_fields(config)


def rope_tensors(config: ModelConfig) -> dict[str, tuple[float, ...]]:
    """Divisors of the frequencies, where a scaling has no key."""
    rope = _rope(config)
    if rope.kind == "llama3":
        divisors = inverse_frequencies(Rope(rope.theta, rope.dim), 1) / inverse_frequencies(rope, 1)
        return {ROPE_DIVISORS: tuple(divisors.tolist())}
    if rope.kind == "divisors":
        return {ROPE_DIVISORS: rope.divisors}
    if rope.kind == "longrope":
        short, long = LONGROPE_DIVISORS
        return {short: rope.divisors, long: rope.long_divisors}
    return {}


def require_said(
    config: ModelConfig, metadata: Mapping[str, Any], tensors: Mapping[str, GgufTensor]
) -> None:
    """Unsupported where a reader of the file would take it for another model; a warning where
    llama.cpp itself leaves out a window, or betas of YaRN, that the file names."""
    said = read_back(metadata, tensors, rope_tensors(config))
    for name in ModelConfig.__dataclass_fields__.keys() - _OTHERWISE:
        ours, theirs = getattr(config, name), getattr(said, name)
        if ours != theirs and not _close(ours, theirs):
            raise Unsupported(f"GGUF says {name} {theirs!r}, and the model has {ours!r}")
    require_layers(config, said)
    require_loadable(config)
    yarn = [rope for rope in config.ropes if rope.kind == "yarn"]
    if any((rope.beta_fast, rope.beta_slow) != (32.0, 1.0) for rope in yarn):
        warnings.warn(
            f"llama.cpp reads no beta_fast and beta_slow for {config.family}: its rotary "
            "frequencies are those of 32 and 1",
            stacklevel=2,
        )
    windows = {entry.window for entry in config.layers}
    window = min((w for w in windows if w is not None), default=config.max_context)
    if config.family in _WHOLE and window < config.max_context:
        warnings.warn(
            f"llama.cpp has no windows for {config.family}: past {window} tokens its attention is "
            "another",
            stacklevel=2,
        )


def require_loadable(config: ModelConfig) -> None:
    """Unsupported for what a GGUF can say and llama.cpp refuses to load, or dies of."""
    family = config.family
    for found, words in (
        (rope_tensors(config) and family not in _DIVISORS, "divisors of rotary frequencies"),
        (
            config.biases - FAMILIES[family].biases and family not in _BIASED,
            "biases where the family has none",
        ),
        (config.tied and family in ("olmo2", "phi2"), "a head that is the embedding"),
        (not config.tied and family == "gemma2", "a head of its own"),
        (
            config.heads * config.head_dim != config.hidden_size and family in _SQUARE,
            "heads that are not as wide as the model together",
        ),
        (
            _rope(config).dim != config.head_dim and family not in _PARTIAL,
            "rotary embeddings of a part of a head",
        ),
    ):
        if found:
            raise Unsupported(f"llama.cpp loads no {family} with {words}")


def require_layers(config: ModelConfig, said: ModelConfig) -> None:
    """Unsupported unless every layer has the window, the frequencies and the attention scale that
    the file says: Gemma's scale follows from how many layers there are."""
    if not _close(config.attention_scale, said.attention_scale):
        raise Unsupported(
            f"GGUF says attention_scale {said.attention_scale!r} of {len(config.layers)} layers, "
            f"and the model has {config.attention_scale!r}"
        )
    for slot, (ours, theirs) in enumerate(zip(config.layers, said.layers, strict=True)):
        if _window(ours, config) != _window(theirs, config):
            raise Unsupported(
                f"layer {ours.layer}, at place {slot}, has a window of {ours.window}, where GGUF "
                f"says {theirs.window}: windows must follow one period"
            )
        if (ours.rope is None) != (theirs.rope is None):
            without = "no position embedding" if ours.rope is None else "a position embedding"
            raise Unsupported(
                f"layer {ours.layer}, at place {slot}, has {without}: GGUF says every fourth layer "
                "has none"
            )
        if ours.rope and theirs.rope and not _same_rope(ours.rope, theirs.rope, config.max_context):
            raise Unsupported(f"layer {ours.layer}: GGUF has no word for its rotary frequencies")


def read_back(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, GgufTensor],
    vectors: Mapping[str, tuple[float, ...]],
) -> ModelConfig:
    """The config that a file of this metadata and these tensors has; `vectors` hold the values of
    the RoPE tensors among them."""
    file = _Header(metadata, tensors, vectors)
    return from_hf(config_from_gguf(file, family_of(file)), str(file.path))


class _Header(GgufFile):
    """A file as its header tells it, before there is one."""

    def __init__(self, metadata, tensors, vectors) -> None:
        self.path, self.metadata = Path("GGUF"), metadata
        places = {name: -1 - index for index, name in enumerate(vectors)}
        self._vectors = {place: vectors[name] for name, place in places.items()}
        self.tensors = dict(tensors)
        for name, place in places.items():
            self.tensors[name] = GgufTensor(_F32, (len(vectors[name]),), place)

    def floats(self, offset: int, count: int) -> tuple[float, ...]:
        return self._vectors[offset]


def _window_fields(config: ModelConfig) -> dict[str, Any]:
    windows = [entry.window for entry in config.layers]
    window = next((window for window in windows if window is not None), None)
    if config.family == "phi3":
        return {"attention.sliding_window": window or 0}  # 0 tells a Phi-4 from the others
    if window is None:
        return {}
    fields: dict[str, Any] = {"attention.sliding_window": window}
    usual = WINDOW_PERIODS.get(config.family)
    if usual is not None:
        period = _period([found is not None for found in windows])
        if period is not None and not _fits(windows, usual):
            fields["attention.sliding_window_pattern"] = period
    return fields


def _period(slides: list[bool]) -> int | None:
    """The p of which every p-th layer sees all and no other does; None: there is none."""
    for period in range(1, len(slides) + 1):
        if _fits(slides, period):
            return period
    return None


def _fits(slides: list, period: int) -> bool:
    return all(bool(s) == bool((slot + 1) % period) for slot, s in enumerate(slides))


def _rope(config: ModelConfig) -> Rope:
    """That of the layers without a window, which the keys are about."""
    whole = [entry.rope for entry in config.layers if entry.rope and entry.window is None]
    if not config.ropes:
        raise Unsupported("none of its layers has a position embedding")
    return (whole or config.ropes)[0]


def _rope_fields(config: ModelConfig) -> dict[str, Any]:
    rope = _rope(config)
    fields: dict[str, Any] = {"rope.dimension_count": rope.dim, "rope.freq_base": rope.theta}
    local = [entry.rope for entry in config.layers if entry.rope and entry.window is not None]
    if config.family == "gemma3" and local:
        fields["rope.freq_base_swa"] = local[0].theta
    if rope.kind == "linear":
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    elif rope.kind == "yarn":
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope.factor,
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.yarn_beta_fast": rope.beta_fast,
            "rope.scaling.yarn_beta_slow": rope.beta_slow,
        }
        usual = yarn_attention(rope.factor)  # which a reader multiplies by what is said
        if not math.isclose(rope.attention_factor, usual, rel_tol=1e-6):
            if len(config.ropes) > 1:  # it goes to Gemma's layers with a window too
                raise Unsupported("GGUF has one attention factor for the rotations of all layers")
            fields["rope.scaling.attn_factor"] = rope.attention_factor / usual
    elif rope.kind == "longrope":
        fields |= {  # no type: its divisors tell, and ik_llama.cpp dies of a word for it
            "rope.scaling.original_context_length": rope.original_context,
            "rope.scaling.attn_factor": rope.attention_factor,
        }
    elif rope.kind == "dynamic":
        raise Unsupported("GGUF has no dynamic scaling of its rotary frequencies")
    elif config.family == "phi3":
        fields["rope.scaling.original_context_length"] = rope.original_context
    return fields


def _close(ours: Any, theirs: Any) -> bool:
    """Equal once stored in float32."""
    both = isinstance(ours, float) and isinstance(theirs, float)
    return both and math.isclose(ours, theirs, rel_tol=1e-6)


def _window(entry: LayerConfig, config: ModelConfig) -> int | None:
    """None also for one that no sequence fills."""
    return None if entry.window is None or entry.window >= config.max_context else entry.window


def _same_rope(ours: Rope, theirs: Rope, longest: int) -> bool:
    if ours.dim != theirs.dim or not math.isclose(
        ours.attention_factor, theirs.attention_factor, rel_tol=1e-5
    ):
        return False
    return all(
        torch.allclose(inverse_frequencies(ours, n), inverse_frequencies(theirs, n), rtol=1e-5)
        for n in (1, longest)
    )
