"""Models of real size without their weights: random 4-bit codes in the shape of a named model.

    python benchmarks/shapes.py NAME DIRECTORY [--layers N] [--packed]

Writes NAME.gguf, and with --packed the directory NAME-packed of the same bits. All matrices are
Q4_0, the embedding too, which the head shares where the model's does: what a token reads is the
file. Scales keep activations near unit size. A trained norm has a few large weights, whose columns
make a sixth of the blocks of its output coarse (benchmarks/results/decoder.md): so have these. The
tokenizer is the default model's, its vocabulary padded.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import MODELS
from torch import Tensor

from engine.architecture.hf_config import from_hf
from engine.checkpoint import open_checkpoint
from engine.checkpoint.gguf_names import EMBEDDING, FINAL_NORM, HEAD
from engine.checkpoint.locate import locate
from engine.commands.output import refuse
from engine.errors import InputError
from engine.export.gguf_fields import architecture, model_fields
from engine.export.gguf_file import Place, typed, write_gguf
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.text import load_text
from engine.text.to_gguf import to_gguf

# What MODELS does not say of a model: head size, vocabulary, whether the head is the embedding.
SHAPES: dict[str, tuple[str, int, int, bool]] = {
    "Llama-3.2-1B": ("Llama", 64, 128256, True),
    "Qwen2.5-1.5B": ("Qwen2", 128, 151936, True),
    "Llama-3-8B": ("Llama", 128, 128256, False),
}
LARGE_EVERY, LARGE = 192, 16.0  # columns of a norm, and their weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, help="the model's own number by default")
    parser.add_argument("--packed", action="store_true")
    asked = parser.parse_args()
    try:
        path = write(asked.name, asked.directory, asked.layers)
        print(path)
        if asked.packed:
            print(write_packed(path))
    except InputError as error:
        refuse(error)


def config_of(name: str, layers: int | None = None) -> dict[str, Any]:
    """As its config.json would say it."""
    family, head_dim, vocab, tied = SHAPES[name]
    model = MODELS[name]
    return {
        "architectures": [f"{family}ForCausalLM"],
        "num_hidden_layers": layers or model.layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_attention_heads": model.hidden_size // head_dim,
        "num_key_value_heads": model.kv_size // head_dim,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
    }


def write(name: str, directory: Path, layers: int | None = None) -> Path:
    """The new file NAME.gguf in `directory`."""
    config = from_hf(config_of(name, layers), name)
    source = locate("smollm2-135m")
    text = load_text(source)
    kind = architecture(config)
    fields: dict[str, Any] = {"general.architecture": kind, "general.name": name}
    fields["general.file_type"] = 2  # Q4_0; without it OpenVINO does not open a file
    fields |= {f"{kind}.{key}": value for key, value in model_fields(config).items()}
    fields |= to_gguf(text, config.vocab_size)
    found = list(places(name, layers))
    generator = torch.Generator().manual_seed(0)

    def data(first: int) -> Iterator[Tensor]:
        for place in found[first:]:
            yield blocks(place, generator) if place.type == "Q4_0" else vector(place)

    directory.mkdir(parents=True, exist_ok=True)
    out = directory / f"{name}.gguf"
    described = {key: typed(value) for key, value in fields.items()}
    write_gguf(out, source, config, described, found, data)
    return out


def write_packed(path: Path) -> Path:
    """The bits of the file as a packed directory beside it."""
    checkpoint = open_checkpoint(path)
    out = path.with_name(f"{path.stem}-packed")
    pack(checkpoint, checkpoint.config, out, Recipe("keep", head=None))
    return out


def places(name: str, layers: int | None = None) -> Iterator[Place]:
    """Every tensor of the file."""
    family, _, vocab, tied = SHAPES[name]
    model = MODELS[name]
    D, F, kv = model.hidden_size, model.ffn_size, model.kv_size
    yield Place(f"{EMBEDDING}.weight", "Q4_0", (vocab, D))
    for layer in range(layers or model.layers):
        for role, shape in {
            "attn_q": (D, D),
            "attn_k": (kv, D),
            "attn_v": (kv, D),
            "attn_output": (D, D),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items():
            yield Place(f"blk.{layer}.{role}.weight", "Q4_0", shape)
            if family == "Qwen2" and role in ("attn_q", "attn_k", "attn_v"):
                yield Place(f"blk.{layer}.{role}.bias", "F32", shape[:1])
        for role in ("attn_norm", "ffn_norm"):
            yield Place(f"blk.{layer}.{role}.weight", "F32", (D,))
    yield Place(f"{FINAL_NORM}.weight", "F32", (D,))
    if not tied:
        yield Place(f"{HEAD}.weight", "Q4_0", (vocab, D))


def blocks(place: Place, generator: torch.Generator) -> Tensor:
    """Bytes of Q4_0: a float16 scale before every 32 codes; about unit RMS of w @ x for unit x."""
    n, k = place.shape
    words = torch.empty(n * k // 32 * 9 // 4, dtype=torch.int64)
    made = words.random_(generator=generator).view(torch.uint8)[: n * k // 32 * 18].view(-1, 18)
    step = (0.5 + made[:, 2].float() / 255) * k**-0.5 / 4.6  # the RMS of codes 0..15 less 8
    made[:, :2] = step.half().view(torch.uint8).view(-1, 2)
    return made.view(-1)


def vector(place: Place) -> Tensor:
    """Bytes of a norm's weights, or of a bias, which is zero."""
    values = torch.zeros(place.shape) if place.name.endswith(".bias") else torch.ones(place.shape)
    if not place.name.endswith(".bias"):
        values[7::LARGE_EVERY] = LARGE
    return values.view(torch.uint8)


if __name__ == "__main__":
    main()
