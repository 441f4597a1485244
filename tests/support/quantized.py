"""Hugging Face directories quantized by other projects' rules: `CASES` draws one of every kind.

A case is (the module's tensors, its `quantization_config`, the weight that they stand for).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.architecture.families import layer_tensors, outer_tensors
from engine.architecture.hf_config import from_hf
from engine.kernels.w4.format import NF4

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 100,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
MODULE = "model.layers.0.self_attn.q_proj"
HEAD = "lm_head.weight"
N, K = 48, 100  # of MODULE; K: no multiple of a group


def write(
    path: Path,
    parts: dict[str, torch.Tensor],
    quantization: dict | None,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A directory with the parts of MODULE and everything else of the model unquantized."""
    tensors = {f"{MODULE}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    config = from_hf(CONFIG, "CONFIG")
    whole = dict(layer_tensors(config, 0).values()) | dict(outer_tensors(config).values())
    plain = {name: values(shape) for name, shape in whole.items()}
    del plain[f"{MODULE}.weight"]
    save_file(plain | tensors, path / "model.safetensors", metadata)
    found = {} if quantization is None else {"quantization_config": quantization}
    (path / "config.json").write_text(json.dumps(CONFIG | found))
    return path


def values(shape: tuple[int, ...]) -> torch.Tensor:
    """What a plain tensor holds: no two neighbours alike, in rows or in columns."""
    return (torch.arange(torch.Size(shape).numel()) % 31).view(shape).half()


def plain_names() -> set[str]:
    """Every tensor of the model, by the name of the weight."""
    config = from_hf(CONFIG, "CONFIG")
    return {
        name for name, _ in (*layer_tensors(config, 0).values(), *outer_tensors(config).values())
    }


def draw(rng: torch.Generator, limit: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, limit, shape, generator=rng)


def into_words(fields: torch.Tensor, bits: int, order=range(8)) -> torch.Tensor:
    """(R, C) -> (R, ceil(C * bits / 32)) int32; field i of a word goes to its place order[i]."""
    per_word = 32 // bits
    fields = torch.nn.functional.pad(fields, (0, -fields.shape[1] % per_word))
    words = sum(
        fields[:, i::per_word].long() << bits * place
        for i, place in enumerate(list(order)[:per_word])
    )
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(rng, bits=4, group=32, desc_act=False, version="gptq", n=N):
    groups, levels = (1 if group == -1 else -(-K // group)), 1 << bits
    q, z = draw(rng, levels, K, n), draw(rng, levels, groups, n)
    z[0, 0] = 0  # less one, it wraps or borrows
    scales = torch.randn(groups, n, generator=rng).half()
    g_idx = torch.arange(K) // (K if group == -1 else group)
    if desc_act:
        g_idx = g_idx[torch.randperm(K, generator=rng)]
    stored = (z - 1) % levels if version == "gptq" else z
    parts = {
        "qweight": into_words(q.T, bits).T,
        "qzeros": into_words(stored, bits),
        "scales": scales,
        "g_idx": g_idx.int(),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": desc_act}
    config |= {"sym": False, "checkpoint_format": version, "pack_dtype": "int32"}
    return parts, config, (scales.float()[g_idx] * (q - z[g_idx])).T


def gptqmodel(rng, bits=4, **options):
    """As GPTQModel stores zero points: it takes ones off whole words, where a 0 borrows."""
    parts, config, weight = gptq(rng, bits, version="gptq_v2", **options)
    words = parts["qzeros"].long() - (0x11111111 if bits == 4 else 0x01010101)
    parts["qzeros"] = ((words + (1 << 31)) % (1 << 32) - (1 << 31)).int()
    meta = {"quantizer": ["optimum:2.1.0", "gptqmodel:7.6.0"]}
    return parts, config | {"checkpoint_format": "gptq", "meta": meta}, weight


def ruled(rng, group=64):
    """A module that has 8 bits by a rule."""
    parts, config, weight = gptq(rng, bits=8, group=group)
    rules = {"-:.*down_proj": {}, "+:.*q_proj": {"bits": 8, "group_size": group}}
    return parts, config | {"bits": 4, "group_size": 128, "dynamic": rules}, weight


def auto_round(rng, **said):
    parts, config, weight = gptq(rng, group=64)
    config = {key: config[key] for key in ("bits", "group_size", "sym")}
    config |= {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
    config |= {"data_type": "int", "extra_config": {"lm_head": {"bits": 16, "data_type": "float"}}}
    return parts, config | said, weight


def awq(rng):
    q, z, group = draw(rng, 16, K, N), draw(rng, 16, -(-K // 64), N), torch.arange(K) // 64
    scales = torch.randn(len(z), N, generator=rng).half()
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibble of each column
    parts = {
        "qweight": into_words(q, 4, order),
        "qzeros": into_words(z, 4, order),
        "scales": scales,
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"}
    return parts, config | {"zero_point": True}, (scales.float()[group] * (q - z[group])).T


def compressed(rng, bits=4, group=32, symmetric=True, actorder=False):
    groups, half = (1 if group == -1 else -(-K // group)), 1 << (bits - 1)
    q, z = draw(rng, 2 * half, N, K), draw(rng, 2 * half, N, groups)
    scale = torch.randn(N, groups, generator=rng).bfloat16()
    g_idx = torch.arange(K) // (K if group == -1 else group)
    parts = {
        "weight_packed": into_words(q, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([N, K]),
    }
    if symmetric:
        z = torch.full_like(z, half)
    else:
        parts["weight_zero_point"] = into_words(z.T, bits).T
    if actorder:
        g_idx = g_idx[torch.randperm(K, generator=rng)]
        parts["weight_g_idx"] = g_idx.int()
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    weights |= {"strategy": "channel" if group == -1 else "group"}
    weights |= {"group_size": None if group == -1 else group}
    other = weights | {"num_bits": 12 - bits}  # a second group, which this module is not of
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": other, "input_activations": None},
            "group_1": {"targets": [f"re:.*{MODULE}"], "weights": weights},
        },
        "ignore": ["lm_head"],
        "sparsity_config": {},
        "transform_config": {},
    }
    return parts, config, (q - z[:, g_idx]) * scale.float()[:, g_idx]


def dense(rng):
    """As llm-compressor wrote it in 2024: how many zeros there are, beside the rules."""
    parts, config, weight = compressed(rng)
    counted = {"format": "dense", "global_sparsity": 0.14, "ignore": [MODULE]}
    return parts, config | {"sparsity_config": counted}, weight


def nf4(rng, nested=False, k=128, blocksize=64, kind="nf4", storage=torch.uint8):
    q, table = draw(rng, 16, N, k), torch.tensor(NF4)
    if kind == "fp4":
        halves = torch.tensor([0, 0.0052083333, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4])
        table = torch.cat((halves, -halves))
    flat = torch.nn.functional.pad(q.flatten(), (0, N * k % 2))
    codes = (flat[::2] << 4 | flat[1::2]).byte()
    parts = {"weight": codes.view(storage)[:, None], "weight.quant_map": table}
    state = {"quant_type": kind, "blocksize": blocksize, "dtype": "float16", "shape": [N, k]}
    blocks = -(-N * k // blocksize)
    absmax = torch.rand(blocks, generator=rng) + 0.1
    parts["weight.absmax"] = absmax
    if nested:
        codes, inner = draw(rng, 256, blocks).byte(), torch.randn(256, generator=rng)
        outer = torch.rand(-(-blocks // 16), generator=rng)
        parts |= {"weight.absmax": codes, "weight.nested_quant_map": inner}
        parts |= {"weight.nested_absmax": outer}
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.25}
        absmax = inner[codes.long()] * outer[torch.arange(blocks) // 16] + 0.25
    text = torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)
    parts[f"weight.quant_state.bitsandbytes__{kind}"] = text
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    config |= {"bnb_4bit_quant_type": kind}
    config |= {"bnb_4bit_quant_storage": str(storage).removeprefix("torch.")}
    scale = absmax[torch.arange(N * k) // blocksize].view(N, k)
    return parts, config, table[q] * scale


def spelt(found, key, other=None):
    """The same with another key in the place of one, or with none."""
    parts, config, weight = found
    value = config.pop(key)
    return parts, config | ({other: value} if other else {}), weight


CASES = {
    "gptq": gptq,
    "gptq-desc_act": lambda rng: gptq(rng, desc_act=True),
    "gptq-v2": lambda rng: gptq(rng, version="gptq_v2", group=128),
    "gptq-v2-format": lambda rng: spelt(
        gptq(rng, version="gptq_v2"), "checkpoint_format", "format"
    ),
    "gptq-column": lambda rng: gptq(rng, group=-1),
    "gptq-8bit-odd": lambda rng: gptq(rng, bits=8, desc_act=True, n=N - 1),
    "gptq-gptqmodel": gptqmodel,
    "gptq-gptqmodel-8bit": lambda rng: gptqmodel(rng, bits=8, n=N - 1),
    "gptq-rules": ruled,
    "gptq-rules-column": lambda rng: ruled(rng, group=-1),
    "auto-round": auto_round,
    "auto-round-rules": lambda rng: auto_round(
        rng, group_size=32, extra_config={f"{MODULE}": {"group_size": 64}}
    ),
    "awq": awq,
    "compressed": compressed,
    "compressed-asymmetric": lambda rng: compressed(rng, symmetric=False),
    "compressed-channel": lambda rng: compressed(rng, group=-1, symmetric=False),
    "compressed-8bit": lambda rng: compressed(rng, bits=8),
    "compressed-dense": dense,
    "compressed-actorder": lambda rng: compressed(rng, symmetric=False, actorder=True),
    "nf4": nf4,
    "nf4-nested": lambda rng: nf4(rng, nested=True),
    "nf4-bfloat16": lambda rng: nf4(rng, storage=torch.bfloat16),
    "fp4": lambda rng: nf4(rng, kind="fp4"),
    "fp4-default": lambda rng: spelt(nf4(rng, kind="fp4"), "bnb_4bit_quant_type"),
    "fp4-nested": lambda rng: nf4(rng, kind="fp4", nested=True),
    "nf4-straddling": lambda rng: nf4(rng, nested=True, k=37),
}
