"""What each quantizer loses: perplexity and divergence of the default model, by method and group.

    python benchmarks/quality.py WORK [--model M] [--text SOURCE] [--samples N] [--llama DIR]

The layers' matrices of the source, in float32, are quantized anew; embedding, head and norms stay
the source's own. Packed directories and finished rows are kept in WORK, where a run that was killed
goes on. Writes benchmarks/results/quality.md; with `--llama`, where libggml-base.so lies, also the
sections of benchmarks/llama_quantizers.py.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pages
import torch
from shapes import positive
from work import begin, clocked, kept, seconds

from engine.api import choose_device, parse_dtype
from engine.artifacts import Evaluation
from engine.benchmark.machine import device_name
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.locate import locate
from engine.commands.output import refuse
from engine.commands.quantize import LENGTH, SAMPLES
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.reference.cache import KVCache
from engine.reference.decoder import Decoder, load_decoder
from engine.runtime.reference import ReferenceRuntime
from engine.text import Text, heldout_text, load_text, mixed_text
from engine.text.samples import read_samples

Samples = list[list[int]]
RESULT = Path(__file__).parent / "results" / "quality.md"
TITLE = "# Quality of the quantizers"
METHODS: dict[str, dict[str, Any]] = {
    "RTN": {"method": "rtn"},
    "RTN, MSE": {"method": "rtn", "clip": "mse"},
    "HQQ": {"method": "hqq"},
    "NF4": {"method": "nf4", "scheme": "codebook"},
    "GPTQ": {"method": "gptq", "clip": "minmax", "v": 4},
    "GPTQ, MSE": {"method": "gptq", "v": 4},
    "GPTQ, MSE, activation order": {"method": "gptq", "act_order": True, "v": 4},
    "GPTQ, MSE, v in 8 bits": {"method": "gptq", "v": 8},
}
SIZES = {  # (group, scheme) -> methods
    (128, "symmetric"): ("RTN", "RTN, MSE", "HQQ", "NF4", "GPTQ", "GPTQ, MSE"),
    (128, "minimum"): ("RTN", "HQQ", "GPTQ, MSE"),
    (64, "symmetric"): ("RTN", "GPTQ", "GPTQ, MSE", "GPTQ, MSE, activation order"),
    (64, "codebook"): ("GPTQ", "GPTQ, MSE", "GPTQ, MSE, v in 8 bits"),
    (32, "minimum"): ("RTN", "GPTQ, MSE"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. Bits count what the layers' matrices take, scales included."""

    method: str
    group: int
    scheme: str
    bits_per_weight: float
    perplexity: float
    kl: float  # mean KL(source || this), nats
    top1_agreement: float
    cpu_seconds: float  # of quantizing, all threads together


class Replayed(ReferenceRuntime):
    """The source's logits: its residual streams are kept, only the head is computed again."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__(decoder)
        self.streams: list[torch.Tensor] = []
        self.at = 0

    def rewind(self) -> "Replayed":
        self.at = 0
        return self

    def forward(self, tokens: torch.Tensor, cache: KVCache, *_: Any, **__: Any) -> torch.Tensor:
        if self.at == len(self.streams):
            taken: dict[int, torch.Tensor] = {}
            super().forward(tokens, cache, tap=taken.__setitem__)
            self.streams.append(taken[len(self.config.layers)])
        self.at += 1
        return self.decoder.head(self.streams[self.at - 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", help="to calibrate gptq on; the built-in text if not given")
    parser.add_argument(
        "--samples", type=positive, default=SAMPLES, help="maximum number of calibration samples"
    )
    parser.add_argument("--dtype", default="float32", help="that the models are evaluated in")
    parser.add_argument("--llama", type=Path, help="where libggml-base.so lies: compare with it")
    parser.add_argument("--out", type=Path, default=RESULT, help="default: results/quality.md")
    given = parser.parse_args()
    try:
        study(given)
    except InputError as error:
        refuse(error)


def study(given: argparse.Namespace) -> None:
    pages.check(given.out, TITLE)
    if given.llama is not None:
        ggml_base(given.llama)
    dtype, path = parse_dtype(given.dtype), locate(given.model)
    text = load_text(path)
    samples, _ = read_samples(given.text, text, LENGTH, most=given.samples, built_in=mixed_text)
    checkpoint, device = open_checkpoint(path), choose_device(None)
    options = {"text": given.text, "samples": given.samples, "dtype": given.dtype}
    begin(given.work, given.model, options)
    decoder = load_decoder(checkpoint, checkpoint.config, device, dtype)
    replayed = Replayed(decoder)
    own = evaluate(replayed, text, heldout_text())
    rows = []

    def row(name: str, recipe: Recipe, out: Path) -> Row:
        spent = packed(checkpoint, recipe, samples, out)
        return judged(name, recipe, out, spent, replayed, text)

    for (group, scheme), names in SIZES.items():
        for name in names:
            chosen: dict[str, Any] = {"group": group, "scheme": scheme, "head": None}
            recipe = Recipe(**chosen | METHODS[name])
            stem = f"{name} {group} {scheme}".lower().replace(",", "").replace(" ", "-")
            out = given.work / stem
            note = out.with_suffix(f".{given.dtype}.json")
            rows.append(kept(note, Row, partial(row, name, recipe, out)))
            print(rows[-1], flush=True)
    write(given, own, bits_of_layers(checkpoint), rows, samples)
    if given.llama is not None:
        script = Path(__file__).with_name("llama_quantizers.py")
        for source in ("on-grid", "off-grid"):
            command = [sys.executable, script, given.work / "llama", "--llama", given.llama]
            command += ["--model", given.model, "--source", source, "--out", given.out]
            if code := subprocess.run(command).returncode:
                raise InputError(f"{script.name}: ended with exit code {code}")


def packed(checkpoint: Checkpoint, recipe: Recipe, samples: Samples, out: Path) -> float:
    """CPU seconds that the directory `out` took to write, now or in an earlier run."""
    file = out.with_suffix(".seconds")
    if not out.exists():
        with clocked(file, time.process_time):
            pack(checkpoint, checkpoint.config, out, recipe, samples)
    return seconds(file)


def judged(
    name: str, recipe: Recipe, out: Path, spent: float, replayed: Replayed, text: Text
) -> Row:
    checkpoint = open_checkpoint(out)
    decoder = load_decoder(checkpoint, checkpoint.config, replayed.device, replayed.dtype)
    decoder.outer = replayed.decoder.outer  # the same values
    opened = ReferenceRuntime(decoder)
    found = evaluate(opened, text, heldout_text(), second=replayed.rewind())
    assert found.kl is not None and found.top1_agreement is not None  # there is a second
    return Row(
        name,
        recipe.group,
        recipe.scheme,
        bits_of_layers(checkpoint),
        found.perplexity,
        found.kl,
        found.top1_agreement,
        spent,
    )


def ggml_base(directory: Path) -> Path:
    """The library that llama.cpp's quantizers are in."""
    library = directory / "libggml-base.so"
    if not library.is_file():
        raise InputError(f"{library}: there is no such file; --llama says where it lies")
    return library


def bits_of_layers(checkpoint: Checkpoint) -> float:
    """Bits a weight of the layers' matrices."""
    names = [n for n in checkpoint.names() if ".layers." in n and len(checkpoint.shape(n)) == 2]
    weights = sum(torch.Size(checkpoint.shape(name)).numel() for name in names)
    return 8 * sum(map(checkpoint.nbytes, names)) / weights


def write(
    given: argparse.Namespace, own: Evaluation, own_bits: float, rows: list[Row], samples: Samples
) -> None:
    """The table, with what it depends on; the sections behind it stay."""
    lines = [
        f"`{given.model}` with the matrices of its layers in float32 quantized anew; embedding, "
        f"head and norms are the source's. Perplexity and KL to the source, in nats, on "
        f"`engine/data/heldout.txt`: {own.windows} windows of {own.window} tokens "
        f"{'with' if own.bos else 'without'} BOS, "
        f"{given.dtype}. GPTQ is calibrated on {len(samples)} samples of {len(samples[0])} "
        f"tokens of {Path(given.text).name if given.text else 'the built-in text'}. CPU seconds "
        "of all threads together, reading and writing included, on "
        f"{device_name(torch.device('cpu'))}. By `benchmarks/quality.py`.",
        "",
        "| group | scheme | method | bits a weight | perplexity | KL | top-1 | CPU s |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
        f"| | | the source | {own_bits:.2f} | {own.perplexity:.3f} | 0 | 100.0% | |",
    ]
    lines += [
        f"| {row.group} | {row.scheme} | {row.method} | {row.bits_per_weight:.2f} | "
        f"{row.perplexity:.3f} | {row.kl:.5f} | {row.top1_agreement:.1%} | {row.cpu_seconds:.0f} |"
        for row in rows
    ]
    pages.put(given.out, TITLE, TITLE, "\n".join(lines), f"`{given.model}` ")


if __name__ == "__main__":
    main()
