"""A stand-in for llama.cpp's converter: tiny models as GGUF, by its names and conventions.

Names come from the `gguf` package's own table (`get_tensor_name_map`), as the converter takes
them; what it changes on the way is written here from its source, independently of the reader.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import torch

_ARCHITECTURES = {
    "LlamaConfig": gguf.MODEL_ARCH.LLAMA,
    "MistralConfig": gguf.MODEL_ARCH.LLAMA,
    "Qwen2Config": gguf.MODEL_ARCH.QWEN2,
    "Qwen3Config": gguf.MODEL_ARCH.QWEN3,
    "PhiConfig": gguf.MODEL_ARCH.PHI2,
    "Phi3Config": gguf.MODEL_ARCH.PHI3,
    "Gemma2Config": gguf.MODEL_ARCH.GEMMA2,
    "Gemma3TextConfig": gguf.MODEL_ARCH.GEMMA3,
    "Olmo2Config": gguf.MODEL_ARCH.OLMO2,
    "SmolLM3Config": gguf.MODEL_ARCH.SMOLLM3,
}


def convert(model, path: Path, fuse_qkv: bool = False) -> None:
    """Writes a transformers model as a float32 GGUF; `fuse_qkv`: as its option says."""
    config = model.config
    architecture = _ARCHITECTURES[type(config).__name__]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    _write_sizes(writer, config)
    _write_rope(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = {name: _converted(x, name, config) for name, x in model.state_dict().items()}
    if fuse_qkv:
        weights = _fused(weights)
    for name, tensor in weights.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored is None and ".qkv_proj." in name:
            stored = f"blk.{name.split('.')[2]}.attn_qkv.{name.rpartition('.')[2]}"
        assert stored is not None, name
        writer.add_tensor(stored, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fused = {}
    for name, tensor in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("k_proj", "v_proj")]
            fused[name.replace("q_proj", "qkv_proj")] = torch.cat([tensor, *parts])
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def permute(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """LlamaModel.permute: the two halves of a head interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape).contiguous()


def _converted(tensor: torch.Tensor, name: str, config: Any) -> torch.Tensor:
    kind = type(config).__name__
    if kind in ("LlamaConfig", "MistralConfig", "SmolLM3Config"):
        if ".q_proj." in name:
            return permute(tensor, config.num_attention_heads)
        if ".k_proj." in name:
            return permute(tensor, config.num_key_value_heads)
    if kind.startswith("Gemma") and name.endswith("norm.weight"):
        return tensor + 1
    return tensor


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    kind = type(config).__name__
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if kind == "PhiConfig":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind in ("Gemma2Config", "Gemma3TextConfig", "Phi3Config"):
        writer.add_sliding_window(config.sliding_window or 0)
    if kind == "MistralConfig":  # the converter drops it; other writers keep it
        writer.add_sliding_window(config.sliding_window)
    if kind == "Gemma2Config":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    parameters = config.rope_parameters
    rope = parameters.get("full_attention", parameters)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    if type(config).__name__ in ("LlamaConfig", "MistralConfig", "PhiConfig", "Phi3Config"):
        writer.add_rope_dimension_count(dim)
    if type(config).__name__ not in ("PhiConfig", "Gemma2Config"):
        writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, dim).numpy())
    if type(config).__name__ == "Phi3Config":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if kind == "longrope":
        attention = rope.get("attention_factor")
        if attention is None:
            stretch = config.max_position_embeddings / config.original_max_position_embeddings
            original = config.original_max_position_embeddings
            attention = math.sqrt(1 + math.log(stretch) / math.log(original))
        writer.add_rope_scaling_attn_factors(attention)
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"])
            writer.add_tensor(f"rope_factors_{length}.weight", factors.numpy())


def llama3_divisors(rope: dict[str, Any], dim: int, context: int | None = None) -> torch.Tensor:
    """(dim / 2,) float32: what llama.cpp divides each frequency by."""
    context = context or rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    divisors = []
    for exponent in range(0, dim, 2):
        turns = context * rope["rope_theta"] ** (-exponent / dim) / (2 * torch.pi)
        if turns > high:
            divisors.append(1.0)
        elif turns < low:
            divisors.append(factor)
        else:
            smooth = (turns - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(divisors, dtype=torch.float32)


def write_tiny(path: Path, change=None) -> None:
    """A Llama of one layer, without transformers: D 32, H 2, G 1, E 16, F 64, V 8.

    `change(fields, tensors)` may edit what is written: metadata, and name -> array or (uint8
    blocks, quantization type).
    """
    sizes = {
        "token_embd": (8, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32), "blk.0.ffn_down": (32, 64),
    }  # fmt: skip
    tensors = {f"{name}.weight": torch.randn(shape).numpy() for name, shape in sizes.items()}
    fields = {
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.tokens": ["<s>", "</s>", *"abcd", "<|im_end|>", "<|eot_id|>"],
        "tokenizer.ggml.token_type": [3, 3, 1, 1, 1, 1, 3, 1],
        "tokenizer.ggml.eos_token_id": 1,
    }
    if change is not None:
        change(fields, tensors)
    writer = gguf.GGUFWriter(path, fields.pop("general.architecture", "llama"))
    for key, value in fields.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[bool] = writer.add_bool
        add.get(type(value), writer.add_array)(key, value)
    for name, tensor in tensors.items():
        data, kind = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
