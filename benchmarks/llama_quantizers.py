"""llama.cpp's own 4-bit quantizers beside ours, at the bits that they really take.

    python benchmarks/llama_quantizers.py WORK [--llama DIR] [--source on-grid|off-grid] ...

`DIR` holds libggml-base.so; if not given, the installed llama-cpp-python's. Its function
`ggml_quantize_chunk` is what `llama-quantize` calls for each matrix; here every matrix of a layer
gets the one type, but Q4_K where the inputs are no multiple of 256: then Q5_0, as llama.cpp falls
back. The importance matrix is the mean square of every input, as `llama-imatrix` takes it, of the
samples that GPTQ is calibrated on. The source is a model whose layers may lie on a grid already (a
Q4_1 file's), or the same function off it: columns and the rows before them rescaled against each
other.
"""

import argparse
import ctypes
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pages
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from quality import RESULT, TITLE, Replayed, bits_of_layers, ggml_base
from safetensors.torch import load_file, save_file
from shapes import positive
from work import begin, kept

from engine.benchmark.machine import device_name
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantize
from engine.checkpoint.locate import locate
from engine.checkpoint.weights import layer_weights, values
from engine.commands.output import refuse
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.export.formats import export
from engine.quantize.packing import hessians, pack
from engine.quantize.recipe import Recipe
from engine.reference.decoder import Decoder, load_decoder
from engine.reference.stream import open_states, pad_batches, step
from engine.runtime.reference import ReferenceRuntime
from engine.text import Text, heldout_text, load_text, mixed_text, read_text_file
from engine.text.samples import read_samples

HEADING = "## Beside llama.cpp"
OURS = (  # group, scheme, bits of v
    *((128, "codebook", 8), (64, "codebook", 4), (64, "symmetric", 4), (128, "minimum", 4)),
    *((64, "codebook", 8), (32, "codebook", 4), (64, "minimum", 4), (32, "codebook", 8)),
    *((32, "minimum", 4), (32, "minimum", 8)),
)
THEIRS = ("Q4_0", "IQ4_NL", "Q4_1", "Q4_K")
FALLBACK = {"Q4_K": "Q5_0"}  # where a row is not whole blocks
SOURCES = {
    "on-grid": "whose own file is Q4_1",
    "off-grid": "its columns rescaled so that no matrix lies on a grid of 4 bits",
}
Importance = list[dict[str, torch.Tensor]]  # by slot and role, (K,) float32


@dataclass(frozen=True)
class Row:
    """Perplexity and mean KL(source || this) in nats, text by text."""

    name: str
    bits: float  # a weight of the layers' matrices
    perplexity: list[float]
    kl: list[float]


class Ggml:
    """libggml-base, where llama.cpp's quantizers are."""

    def __init__(self, directory: Path) -> None:
        quantize = ctypes.CDLL(str(ggml_base(directory))).ggml_quantize_chunk
        quantize.restype = ctypes.c_size_t
        whole = ctypes.c_int64
        pointer = ctypes.c_void_p
        quantize.argtypes = [ctypes.c_int, pointer, pointer, whole, whole, whole, pointer]
        self._quantize = quantize

    def blocks(
        self, kind: str, weight: torch.Tensor, importance: torch.Tensor | None
    ) -> GgufBlocks:
        """(N, K) float32 as `kind`, or what replaces it where K is not whole blocks of it."""
        n, k = weight.shape
        if k % GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]:
            kind = FALLBACK[kind]
        number = GGMLQuantizationType[kind]
        weights, nbytes = GGML_QUANT_SIZES[number]
        data = torch.empty(n, k // weights * nbytes, dtype=torch.uint8)
        weight = weight.float().contiguous()
        at = None if importance is None else importance.float().contiguous().data_ptr()
        written = self._quantize(number, weight.data_ptr(), data.data_ptr(), 0, n, k, at)
        assert written == data.numel(), (kind, written, data.shape)
        return GgufBlocks(kind, (n, k), data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--llama", type=Path, help="where libggml-base.so lies")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--source", choices=("on-grid", "off-grid"), default="off-grid")
    parser.add_argument("--text", action="append", help="to judge by, repeatable")
    parser.add_argument("--windows", type=positive, default=10, help="of 512 tokens, of each text")
    parser.add_argument(
        "--samples", type=positive, default=16, help="of 512 tokens, to calibrate on"
    )
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/quality.md")
    given = parser.parse_args()
    try:
        compare(given)
    except InputError as error:
        refuse(error)


def compare(given: argparse.Namespace) -> None:
    """Rows that are done are kept in `given.work`; the section of quality.md is written anew."""
    pages.check(given.out, TITLE)
    ggml = Ggml(given.llama or installed())
    checkpoint = open_checkpoint(locate(given.model))
    text = load_text(checkpoint.path)
    texts = [read_text_file(Path(file)) for file in given.text or ()] or [heldout_text()]
    samples, _ = read_samples(None, text, 512, most=given.samples, built_in=mixed_text)
    if given.source == "off-grid":
        check_rescalable(checkpoint)
    options = {"text": given.text, "windows": given.windows, "samples": given.samples}
    begin(given.work, given.model, options)
    if given.source == "off-grid":
        checkpoint = off_grid(checkpoint, given.work / "plain")
    judge = Judge(checkpoint, text, texts, given.windows)
    rows = [source_row(given, checkpoint, judge)]
    ways = ours(given, checkpoint, judge, samples), theirs(given, checkpoint, judge, samples, ggml)
    for row in chain(*ways):
        rows.append(row)
        print(row, flush=True)
    write(given, rows)


class Judge:
    """Rows of what replaces the layers of one source, embedding and head left as they are."""

    def __init__(
        self, checkpoint: Checkpoint, text: Text, texts: Sequence[str], count: int
    ) -> None:
        self.source = load_decoder(checkpoint, checkpoint.config)
        self.text, self.texts, self.count = text, texts, count
        self.replayed = [Replayed(self.source) for _ in texts]

    def __call__(self, name: str, bits: float, layers: Sequence[dict] | None) -> Row:
        decoder = Decoder(self.source.config, self.source.outer, layers or self.source.layers)
        found = [
            evaluate(
                ReferenceRuntime(decoder), self.text, text, count=self.count, second=again.rewind()
            )
            for text, again in zip(self.texts, self.replayed, strict=True)
        ]
        return Row(
            name, bits, [each.perplexity for each in found], [each.kl or 0 for each in found]
        )


def source_row(given: argparse.Namespace, checkpoint: Checkpoint, judge: Judge) -> Row:
    note = given.work / f"{given.source} source.json"
    return kept(note, Row, lambda: judge("the source", bits_of_layers(checkpoint), None))


def installed() -> Path:
    """Where llama-cpp-python has its libraries."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise InputError("llama.cpp: expected --llama, or pip install llama-cpp-python")
    return Path(spec.origin).parent / "lib"


def theirs(
    given: argparse.Namespace,
    checkpoint: Checkpoint,
    judge: Judge,
    samples: list[list[int]],
    ggml: Ggml,
) -> Iterator[Row]:
    known = importance(checkpoint, samples)

    def quantized(name: str, kind: str, weighed: Importance | None) -> Row:
        layers, nbytes, count = [], 0, 0
        for slot, weights in enumerate(judge.source.layers):
            made = {}
            for role, weight in weights.items():
                if weight.dim() == 2:
                    scores = weighed[slot][role] if weighed else None
                    blocks = ggml.blocks(kind, weight, scores)
                    nbytes, count = nbytes + blocks.data.numel(), count + weight.numel()
                    weight = dequantize(blocks)
                made[role] = weight
            layers.append(made)
        return judge(name, 8 * nbytes / count, layers)

    for kind in THEIRS:
        for weighed in (None, known):
            name = f"llama.cpp {kind}" + (", importance matrix" if weighed else "")
            note = given.work / f"{given.source} {name}.json"
            yield kept(note, Row, partial(quantized, name, kind, weighed))


def ours(
    given: argparse.Namespace, checkpoint: Checkpoint, judge: Judge, samples: list[list[int]]
) -> Iterator[Row]:

    def packed(name: str, recipe: Recipe, out: Path) -> Row:
        if not out.exists():
            pack(checkpoint, checkpoint.config, out, recipe, samples)
        made = open_checkpoint(out)
        return judge(name, bits_of_layers(made), load_decoder(made, made.config).layers)

    for group, scheme, v in OURS:
        name = f"GPTQ, {scheme}, groups of {group}" + (", v in 8 bits" if v == 8 else "")
        note = given.work / f"{given.source} {name}.json"
        recipe = Recipe("gptq", 4, group, scheme, head=None, v=v)
        yield kept(note, Row, partial(packed, name, recipe, note.with_suffix("")))


@torch.no_grad()
def importance(checkpoint: Checkpoint, samples: list[list[int]]) -> Importance:
    """The mean square of every input of every matrix, of the source as it is."""
    config, batches = checkpoint.config, list(pad_batches(samples, 2048, checkpoint.config))
    states = open_states(checkpoint, config, batches)
    count = sum(map(len, samples))
    found = []
    for slot, entry in enumerate(config.layers):
        stored = layer_weights(checkpoint, config, entry.layer)
        weights = {role: values(matrix) for role, matrix in stored}
        sums = hessians(config, slot, weights, states, batches)
        found.append({role: total.diagonal() / count for role, total in sums.items()})
        for index, tokens in enumerate(batches):
            states.put(index, step(config, slot, weights, states[index], tokens))
        states.advance()
    return found


def check_rescalable(checkpoint: Checkpoint) -> None:
    """InputError for a model that `off_grid` would change."""
    config = checkpoint.config
    if config.family != "llama" or config.biases:
        raise InputError(
            f"{checkpoint.path}: --source off-grid takes a Llama without biases, found a "
            f"{config.architecture}{' with biases' if config.biases else ''}"
        )


def off_grid(checkpoint: Checkpoint, out: Path) -> Checkpoint:
    """The same function in float32, a Llama's, every matrix's columns rescaled at random.

    By a factor of 0.8 to 1.25: what feeds a column, a norm's weight or a matrix's row, is divided.
    """
    if out.exists():
        return open_checkpoint(out)
    plain = out.with_name("half-rescaled")
    shutil.rmtree(plain, ignore_errors=True)  # of a killed run: to rescale again would not do
    export(checkpoint, checkpoint.config, plain, "hf", dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    config = checkpoint.config
    files = {file: load_file(file) for file in sorted(plain.glob("*.safetensors"))}
    where = {name: tensors for tensors in files.values() for name in tensors}

    def part(layer: int, name: str) -> torch.Tensor:
        key = f"model.layers.{layer}.{name}.weight"
        return where[key][key]

    def factors(size: int) -> torch.Tensor:
        return torch.empty(size).uniform_(-1, 1, generator=rng).mul_(0.2231).exp_()

    for layer in range(len(config.layers)):
        for norm, read in (
            ("input_layernorm", [f"self_attn.{name}_proj" for name in "qkv"]),
            ("post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"]),
        ):
            scale = factors(config.hidden_size)
            part(layer, norm).div_(scale)
            for name in read:
                part(layer, name).mul_(scale)
        scale = factors(part(layer, "mlp.up_proj").shape[0])
        part(layer, "mlp.up_proj").div_(scale[:, None])
        part(layer, "mlp.down_proj").mul_(scale)
        v, o = part(layer, "self_attn.v_proj"), part(layer, "self_attn.o_proj")
        scale = factors(v.shape[0])
        v.div_(scale[:, None])
        repeats = o.shape[1] // v.shape[0]
        o.mul_(scale.view(-1, 1, config.head_dim).expand(-1, repeats, -1).flatten())
    for file, tensors in files.items():
        save_file(tensors, file, metadata={"format": "pt"})
    plain.rename(out)
    return open_checkpoint(out)


def write(given: argparse.Namespace, rows: list[Row]) -> None:
    """This source's section of quality.md; the other sections stay."""
    names = [Path(file).name for file in given.text or ("heldout.txt",)]
    lines = [
        f"`{given.model}`, {SOURCES[given.source]}; perplexity and KL to the source in nats on "
        f"{given.windows} windows of 512 tokens of each text, by the float32 reference; "
        f"{given.samples} samples of 512 tokens of the built-in mixed text for GPTQ and for the "
        "importance matrix. Q4_K is Q5_0 where the inputs are no multiple of 256. On "
        f"{device_name(torch.device('cpu'))}. By `benchmarks/llama_quantizers.py`.",
        "",
        f"| | bits a weight | {' | '.join(names)} | KL, mean of the texts |",
        "|---|---:|" + "---:|" * (len(names) + 1),
    ]
    for row in sorted(rows, key=lambda row: (round(row.bits, 2), sum(row.kl))):
        cells = " | ".join(f"{each:.3f}" for each in row.perplexity)
        lines.append(f"| {row.name} | {row.bits:.2f} | {cells} | {sum(row.kl) / len(row.kl):.5f} |")
    heading, about = f"{HEADING}, {given.source}", f"`{given.model}`, "
    pages.put(given.out, TITLE, heading, "\n".join(lines), about)


if __name__ == "__main__":
    main()
