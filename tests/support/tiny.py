"""Tiny random checkpoints of every family, written by transformers.

Each case is the config of one model: small sizes, but every rule of its family in force within a
few dozen tokens (windows shorter than the sequences, scaling past the original context, several
layer types). Weights are drawn wide enough that no rule hides below the tolerance.
"""

from pathlib import Path
from typing import Any

import torch

VOCAB = 160
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Overrides for matrices of whole K-quant blocks, 256 columns; weights as wide for as many as 0.1 is
# for 48.
WIDE = {
    "spread": 0.043,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7],
    "long_factor": [1.0, 2.0, 3.5, 6.0],
}


def _scaled(scaling: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0} | scaling}


# name -> (config class, what it sets beside the sizes)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-biased-tied": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "llama-linear": ("LlamaConfig", _scaled({"rope_type": "linear", "factor": 4.0})),
    "llama-dynamic": (
        "LlamaConfig",
        _scaled({"rope_type": "dynamic", "factor": 2.0}) | {"max_position_embeddings": 48},
    ),
    "llama-llama3": ("LlamaConfig", _scaled(_LLAMA3) | {"head_dim": 16}),
    "llama-yarn": ("LlamaConfig", _scaled(_YARN) | {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 13}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "phi2": ("PhiConfig", {"partial_rotary_factor": 0.5}),
    "phi2-qk-norm-tied": (  # its head has a bias beside the embedding's matrix
        "PhiConfig",
        {"partial_rotary_factor": 0.5, "qk_layernorm": True, "tie_word_embeddings": True},
    ),
    "phi3": ("Phi3Config", {"sliding_window": 17}),
    "phi3-longrope": (
        "Phi3Config",
        _scaled(_LONG) | {"original_max_position_embeddings": 40},
    ),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 24},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 9,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "smollm3-window": ("SmolLM3Config", {"use_sliding_window": True, "sliding_window": 10}),
}


# The same with settings of rotary embeddings that are not the usual ones, for what reads them.
ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3-odd": (
        "LlamaConfig",
        _scaled(_LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0}) | {"head_dim": 16},
    ),
    "llama-yarn-odd": (
        "LlamaConfig",
        _scaled(
            _YARN
            | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
            | {"mscale": 1.0, "mscale_all_dim": 0.5}
        )
        | {"head_dim": 16},
    ),
    "llama-yarn-factor": (
        "LlamaConfig",
        _scaled(_YARN | {"attention_factor": 1.7}) | {"head_dim": 16},
    ),
    "phi3-longrope-factor": (
        "Phi3Config",
        _scaled(_LONG | {"attention_factor": 1.7}) | {"original_max_position_embeddings": 40},
    ),
}


def build(case: str, seed: int, spread: float = 0.15, **overrides: Any):
    """The transformers model of a case: float32, eager attention, weights drawn that wide."""
    import transformers

    class_name, settings = (CASES | ODD)[case]
    config = getattr(transformers, class_name)(**(_SIZES | settings | overrides))
    config._attn_implementation = "eager"
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 2 * spread if "norm" in name or name.endswith("bias") else spread
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def write(case: str, directory: Path, seed: int, **overrides: Any):
    """Saves the model as a Hugging Face directory and returns it."""
    model = build(case, seed, **overrides)
    model.save_pretrained(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    """Words that are numbers, so that any text of numbers is tokens of the tiny vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {str(number): number for number in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
