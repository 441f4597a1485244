"""What the harness damages: a sound case of every kind of file, and what reads each.

A reader opens the file, and where it is a model loads it on the native path and makes 3 tokens.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from support import llama_files, quantized
from support.gguf_blocks import scaled_blocks

from engine.architecture.families import layer_tensors, outer_tensors
from engine.architecture.hf_config import from_hf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_parameters": YARN | {"rope_theta": 1e4}},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 8,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "rope_scaling": LONG,
        "original_max_position_embeddings": 32,
        "sliding_window": None,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}1 {{ m['content'] | trim }}"
    "{% elif loop.index > 3 %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} 4{% endif %}"
)


class Reader(NamedTuple):
    write: Callable[[Path, torch.Generator], None]  # a sound case into an empty directory
    damaged: tuple[str, ...]  # the files of it that are damaged
    read: Callable[[Path], object]


def model(case: str, rng: torch.Generator, directory: Path) -> None:
    raw = SIZES | CONFIGS[case]
    config = from_hf(raw, case)
    tensors = dict(outer_tensors(config).values())
    for layer in range(config.total_layers):
        tensors |= dict(layer_tensors(config, layer).values())
    values = {name: torch.randn(shape, generator=rng) / 8 for name, shape in tensors.items()}
    save_file(values, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(raw))
    tokenizer(directory)


def tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({str(n): n for n in range(32)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(directory / "tokenizer.json"))
    said = {"bos_token": "1", "eos_token": {"content": "2"}, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(said))


def words(fields: dict, _: dict) -> None:
    """A vocabulary that is read, for a GGUF."""
    fields["tokenizer.ggml.model"] = "gpt2"
    fields["tokenizer.ggml.tokens"] = ["<s>", "</s>", *"abc", "ab", "<|im_end|>", "<|eot_id|>"]
    fields["tokenizer.ggml.merges"] = ["a b"]


BLOCKS = {
    "attn_q": "Q4_0", "attn_k": "Q8_0", "attn_v": "Q5_0", "attn_output": "IQ4_NL",
    "ffn_gate": "Q4_K", "ffn_up": "Q5_K", "ffn_down": "Q6_K", "token_embd": "Q6_K",
}  # fmt: skip


def blocks(path: Path, rng: torch.Generator) -> None:
    """A GGUF in blocks, K-quants among them, 256 wide as these must be."""

    def change(fields: dict, tensors: dict) -> None:
        words(fields, tensors)
        fields["llama.embedding_length"] = fields["llama.feed_forward_length"] = 256
        for name, tensor in tensors.items():
            part = name.removesuffix(".weight").rpartition(".")[2]
            if part not in BLOCKS:
                tensors[name] = torch.randn(256, generator=rng).numpy()
                continue
            rows = {"attn_k": 128, "attn_v": 128, "token_embd": len(tensor)}.get(part, 256)
            data = scaled_blocks(rng, BLOCKS[part], rows, 256, 0.05)
            tensors[name] = data.numpy(), GGMLQuantizationType[BLOCKS[part]]

    llama_files.write_tiny(path, change)


def packed(directory: Path, rng: torch.Generator) -> None:
    model("llama", rng, directory)
    pack_within(directory, directory, method="rtn", group=16, head=4)
    (directory / "model.safetensors").unlink()


def packed_blocks(directory: Path, rng: torch.Generator) -> None:
    """Tiles with scales under scales, and in six bits."""
    blocks(directory / "m.gguf", rng)
    pack_within(directory / "m.gguf", directory, method="keep", head=None)
    (directory / "m.gguf").unlink()


def pack_within(source: Path, directory: Path, **recipe: Any) -> None:
    from engine.checkpoint import open_checkpoint
    from engine.quantize.packing import pack
    from engine.quantize.recipe import Recipe

    checkpoint, out = open_checkpoint(source), directory / "packed"
    pack(checkpoint, checkpoint.config, out, Recipe(**recipe))
    for file in out.iterdir():
        shutil.move(file, directory / file.name)
    out.rmdir()


OTHERS = {name: quantized.CASES[name] for name in ("gptq-desc_act", "awq", "compressed-asymmetric")}
OTHERS["nf4"] = lambda rng: quantized.nf4(rng, nested=True, k=quantized.K)


def of_others(case: str) -> Callable[[Path, torch.Generator], None]:
    def write(directory: Path, rng: torch.Generator) -> None:
        parts, quantization, _ = OTHERS[case](rng)
        quantized.write(directory, parts, quantization)
        tokenizer(directory)

    return write


def artefacts(directory: Path, rng: torch.Generator) -> None:
    from engine.artifacts import Plan, Profile
    from engine.checkpoint import open_checkpoint
    from engine.checkpoint.weights import lineage_hash

    model("llama", rng, directory)
    checkpoint = open_checkpoint(directory)
    config = checkpoint.config
    ids = config.architecture_hash, lineage_hash(checkpoint, config)
    rows = ((0.1, 0.2), (0.3,))
    Profile(
        "m", *ids, 2, (0, 1), rows, rows, (0.1, 0.2), (1.0, 1.0), "angular", "last", 3, 3, 30, 10,
        True, "hash",
    ).save(directory / "profile.json")  # fmt: skip
    Plan("m", *ids, 2, (0,), "similarity", 0.1, (), None, None, "").save(directory / "plan.json")


def leftovers(directory: Path, rng: torch.Generator) -> None:
    """A run of prune that ended before it was whole, and one of a streamed profile."""
    from engine.checkpoint import open_checkpoint
    from engine.export import directory as export
    from engine.reference.stream import open_states
    from engine.scratch import Scratch

    model("llama", rng, directory)
    checkpoint = open_checkpoint(directory)
    described = export.sliced_config(checkpoint.config, torch.float16)
    partial = export.begin(directory / "out", directory, checkpoint.config, described)
    Scratch.held(partial).release()
    (directory / "work").mkdir()
    open_states(
        checkpoint, checkpoint.config, [torch.ones(1, 4).long()], directory=directory / "work"
    )


def adapter(directory: Path, rng: torch.Generator) -> None:
    """Beside a packed base."""
    from engine.checkpoint import open_checkpoint
    from engine.checkpoint.adapter import AdaptedCheckpoint, Pair, places
    from engine.healing import adapters
    from engine.healing.settings import Settings

    (directory / "work").mkdir()
    packed(directory / "work", rng)
    base, pairs = open_checkpoint(directory / "work"), {}
    for module, (shape, _) in places(base.config, base.names()).items():
        a, b = (torch.randn(size, generator=rng) for size in ((2, shape[1]), (shape[0], 2)))
        pairs[module] = Pair(a / 8, b / 8)
    settings = Settings(("qlora",), steps=1, rank=2)
    adapters.write(AdaptedCheckpoint(base, pairs, 1.0), settings, directory / "out", beside={})
    for file in (directory / "out").iterdir():
        shutil.move(file, directory / file.name)
    (directory / "out").rmdir()


def run(path: Path) -> object:
    import engine

    with engine.load(path, threads=1) as opened:
        return opened.generate([3, 1, 4], max_new_tokens=3, ignore_eos=True)


def chat(path: Path) -> object:
    import engine

    messages = [{"role": "user", "content": " 3 5"}]
    with engine.load(path, threads=1) as opened:
        return opened.generate(messages, max_new_tokens=3, ignore_eos=True)


def plan(path: Path) -> object:
    from engine.artifacts import Plan, Profile
    from engine.checkpoint import choose_layers, open_checkpoint
    from engine.pruning.plan import plan_from, similarity

    found = Profile.load(path / "profile.json")
    plan_from(found, similarity(found, 1, frozenset()), "similarity", frozenset(), None)
    return choose_layers(open_checkpoint(path), Plan.load(path / "plan.json"))


def resume(path: Path) -> object:
    from engine.checkpoint import open_checkpoint
    from engine.export.hf import prune
    from engine.reference.stream import stream

    checkpoint = open_checkpoint(path)
    batches, seen = [torch.ones(1, 4).long()], []
    stream(
        checkpoint, checkpoint.config, batches, lambda *a: seen.append(a), directory=path / "work"
    )
    prune(checkpoint, checkpoint.config, path / "out", dtype=torch.float16)
    return seen


HEADERS, CONFIG = ("model.safetensors",), ("config.json",)
READERS = {
    **{
        f"{part} of {case}": Reader(lambda d, g, case=case: model(case, g, d), files, run)
        for case in CONFIGS
        for part, files in (("config", CONFIG), ("tensors", HEADERS))
    },
    "gguf": Reader(
        lambda d, _: llama_files.write_tiny(d / "m.gguf", words),
        ("m.gguf",),
        lambda d: run(d / "m.gguf"),
    ),
    "gguf of blocks": Reader(
        lambda d, g: blocks(d / "m.gguf", g), ("m.gguf",), lambda d: run(d / "m.gguf")
    ),
    "packed": Reader(
        packed, ("model-00001-of-00003.safetensors", "model.safetensors.index.json", *CONFIG), run
    ),
    "packed blocks": Reader(packed_blocks, ("model-00001-of-00002.safetensors", *CONFIG), run),
    **{case: Reader(of_others(case), (*HEADERS, *CONFIG), run) for case in OTHERS},
    "adapter": Reader(adapter, ("adapter_config.json", "adapter_model.safetensors"), run),
    "tokenizer": Reader(
        lambda d, g: model("llama", g, d), ("tokenizer.json", "tokenizer_config.json"), chat
    ),
    "template": Reader(lambda d, g: model("llama", g, d), ("tokenizer_config.json",), chat),
    "profile and plan": Reader(artefacts, ("profile.json", "plan.json"), plan),
    "leftovers": Reader(
        leftovers,
        ("out.partial/resume.json", "out.partial/config.json", "work/progress.json"),
        resume,
    ),
}
