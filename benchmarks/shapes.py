"""Models of real size without their weights: random codes in the shape of a named model.

    python benchmarks/shapes.py NAME DIRECTORY [--layers N] [--packed]

Writes NAME.gguf, with fewer layers NAME-N-layers.gguf, and with --packed the directory NAME-packed
or NAME-N-layers-packed of the same weights, be the file new or there already. What was killed goes
on when it is asked for again. All matrices are Q4_0, the embedding too, which the head shares where
the model's does: what a token reads is the file. Those of NAME-Q4_K_M are as llama.cpp has them in
a file of that kind: Q4_K, but Q6_K the head and, in every second layer or so, `v` and `down`.
Scales keep activations near unit size. A trained norm has a few large weights, whose columns make a
sixth of the blocks of its output coarse (benchmarks/results/decoder.md): so have these. The
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
from engine.export.gguf_file import Place, typed_fields, write_gguf
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
NUMBERS = {"Q4_0": 2, "Q4_K_M": 15}  # of what a file holds most
MIXED = "-Q4_K_M"
FILES = [*SHAPES, *(name + MIXED for name in SHAPES)]
LARGE_EVERY, LARGE = 192, 16.0  # columns of a norm, and their weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=FILES, help="whose shape, and how its weights are stored")
    parser.add_argument("directory", type=Path, help="in which NAME.gguf is written")
    parser.add_argument("--layers", type=positive, help="the model's own number by default")
    parser.add_argument("--packed", action="store_true", help="a packed directory beside it, too")
    asked = parser.parse_args()
    try:
        path = place_of(asked.name, asked.directory, asked.layers)
        there = asked.packed and path.is_file()  # after a run that was killed as it packed
        if not there:
            write(asked.name, asked.directory, asked.layers)
        print(path)
        if asked.packed:
            print(write_packed(path))
    except InputError as error:
        refuse(error)
    except OSError as error:
        refuse(f"{error.filename or asked.directory}: {error.strerror or error}")


def positive(text: str) -> int:
    """An argument of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, found {value}")
    return value


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


def bits_of(file: str) -> tuple[str, str]:
    """(name of its shape, Q4_0 or Q4_K_M)."""
    return file.removesuffix(MIXED), "Q4_K_M" if file.endswith(MIXED) else "Q4_0"


def cut_of(name: str, layers: int | None) -> str:
    """What the name of a file says of it that has not all layers of its shape."""
    return "" if layers in (None, MODELS[name].layers) else f"-{layers}-layers"


def place_of(file: str, directory: Path, layers: int | None = None) -> Path:
    """Where `write` puts FILE."""
    return directory / f"{file}{cut_of(bits_of(file)[0], layers)}.gguf"


def write(file: str, directory: Path, layers: int | None = None) -> Path:
    """The new file FILE.gguf in `directory`, FILE one of FILES; a run that was killed goes on to
    the same bits."""
    name, bits = bits_of(file)
    cut = cut_of(name, layers)
    config = from_hf(config_of(name, layers), name)
    source = locate("smollm2-135m")
    text = load_text(source)
    kind = architecture(config)
    fields: dict[str, Any] = {"general.architecture": kind, "general.name": name + cut}
    fields["general.file_type"] = NUMBERS[bits]  # without it OpenVINO does not open a file
    fields |= {f"{kind}.{key}": value for key, value in model_fields(config).items()}
    fields |= to_gguf(text, config.vocab_size)
    found = list(places(name, layers, bits))
    generator = torch.Generator().manual_seed(0)

    def data(first: int) -> Iterator[Tensor]:
        for index, place in enumerate(found):
            made = vector(place) if place.type == "F32" else blocks(place, generator)
            if index >= first:  # those before are only drawn, for the numbers behind them
                yield made

    directory.mkdir(parents=True, exist_ok=True)
    out = place_of(file, directory, layers)
    write_gguf(out, source, config, typed_fields(fields), found, data)
    return out


def write_packed(path: Path) -> Path:
    """The bits of the file as a packed directory beside it."""
    checkpoint = open_checkpoint(path)
    out = path.with_name(f"{path.stem}-packed")
    pack(checkpoint, checkpoint.config, out, Recipe("keep", head=None))
    return out


def places(name: str, layers: int | None = None, bits: str = "Q4_0") -> Iterator[Place]:
    """Every tensor of the file."""
    few, more = ("Q4_0", "Q4_0") if bits == "Q4_0" else ("Q4_K", "Q6_K")
    family, _, vocab, tied = SHAPES[name]
    model = MODELS[name]
    D, F, kv = model.hidden_size, model.ffn_size, model.kv_size
    yield Place(f"{EMBEDDING}.weight", more if tied else few, (vocab, D))
    count = layers or model.layers
    for layer in range(count):
        eighth = count // 8
        spared = layer < eighth or layer >= 7 * count // 8 or (layer - eighth) % 3 == 2
        for role, shape in {
            "attn_q": (D, D),
            "attn_k": (kv, D),
            "attn_v": (kv, D),
            "attn_output": (D, D),
            "ffn_gate": (F, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
        }.items():
            kind = more if spared and role in ("attn_v", "ffn_down") else few
            yield Place(f"blk.{layer}.{role}.weight", kind, shape)
            if family == "Qwen2" and role in ("attn_q", "attn_k", "attn_v"):
                yield Place(f"blk.{layer}.{role}.bias", "F32", shape[:1])
        for role in ("attn_norm", "ffn_norm"):
            yield Place(f"blk.{layer}.{role}.weight", "F32", (D,))
    yield Place(f"{FINAL_NORM}.weight", "F32", (D,))
    if not tied:
        yield Place(f"{HEAD}.weight", more, (vocab, D))


def blocks(place: Place, generator: torch.Generator) -> Tensor:
    """Random bytes of the type's blocks under scales for about unit RMS of w @ x for unit x."""
    n, k = place.shape
    count, nbytes = n * place.row_shape[-1] // place.tensor.type.nbytes, place.tensor.type.nbytes
    words = torch.empty(count * nbytes // 8 + 1, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # by default the top bit is never set
    made = words.view(torch.uint8)[: count * nbytes].view(count, nbytes)
    step = (0.5 + made[:, 16].float() / 255) * k**-0.5

    def put(at: int, halves: Tensor) -> None:
        made[:, at : at + 2] = halves.half().view(torch.uint8).view(-1, 2)

    if place.type == "Q4_0":
        # Of either sign: the codes' mean of half a step would leave one text, whatever the prompt.
        sign = 1 - 2 * (made[:, 0] & 1).float()
        put(0, sign * step / 4.6)  # the RMS of codes 0..15 less 8
    elif place.type == "Q4_K":  # every minimum is 7.5 of its step: four bytes twice, then nibbles
        put(0, step / (4.6 * 36.8))  # the RMS of 0..63
        put(2, 7.5 * step / (4.6 * 36.8))
        made[:, 8:12] = made[:, 4:8]
        made[:, 12:16] = (made[:, 12:16] & 15) * 17
    else:
        put(208, step / (18.5 * 73.9))  # codes 0..63 less 32, and steps -128..127
    return made.view(-1)


def vector(place: Place) -> Tensor:
    """Bytes of a norm's weights, or of a bias, which is zero."""
    values = torch.zeros(place.shape) if place.name.endswith(".bias") else torch.ones(place.shape)
    if not place.name.endswith(".bias"):
        values[7::LARGE_EVERY] = LARGE
    return values.view(torch.uint8)


if __name__ == "__main__":
    main()
