"""llama.cpp's tensor names, by role, and what its converter changes on the way from Hugging Face.

Roles are those of `engine.architecture.families`, so every family's mapping follows from its own
names.
"""

# blk.<layer>.<name>.weight or .bias
LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "qkv": "attn_qkv",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "gate_up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
EMBEDDING, FINAL_NORM, HEAD = "token_embd", "output_norm", "output"

# Not weights: frequencies, which `gguf_config` puts into the config, or ignores as derivable.
ROPE_DIVISORS = "rope_freqs.weight"
LONGROPE_DIVISORS = ("rope_factors_short.weight", "rope_factors_long.weight")
ROPE_TENSORS = {ROPE_DIVISORS, *LONGROPE_DIVISORS}
ROPE_LAYER_NAME = "attn_rot_embd"

# general.architecture, which are keys in FAMILIES too. Mistral is written as "llama".
ARCHITECTURES = (
    *("llama", "qwen2", "qwen3", "phi2", "phi3", "gemma2", "gemma3", "olmo2", "smollm3"),
)
# Control tokens that end a turn or a text, whatever the metadata names; llama.cpp stops at these.
END_TOKENS = {
    *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
    *("<|end_of_text|>", "</s>", "<eos>", "<EOT>", "<｜end▁of▁sentence｜>"),
}
# q and k rows are stored for interleaved RoPE: (2, E / 2) of every head as (E / 2, 2).
PERMUTED = {"llama", "smollm3"}
