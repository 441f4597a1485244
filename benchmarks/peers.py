"""Ours beside llama.cpp, ik_llama.cpp, OpenVINO and transformers on this CPU.

    python benchmarks/peers.py [--shape NAME] [--isa NAME] [--peer-python PEER=PATH ...]

All take turns on the same file, prompts and number of threads, in every setting that may be a
peer's fastest: the default model, the same as Q4_0, which llama.cpp writes, and every `--shape` of
random weights, Q4_0 or as in files of Q4_K_M (benchmarks/shapes.py). Writes the section of its
instruction set in benchmarks/results/cpu.md and leaves the others.

`--isa` limits ours, and transformers by the switches of torch and oneDNN; OpenVINO, whose releases
heed none yet, is left out below the processor's own set. llama.cpp and ik are limited when they are
built, and refused where they hold more than was asked:

    AVX2='-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_AVX512=OFF'
    CMAKE_ARGS=$AVX2 pip install --no-binary llama-cpp-python llama-cpp-python

ik-llama-cpp-python 0.1.5 builds from source only without its quantizer, which lacks a file:

    pip download --no-deps --no-binary :all: ik-llama-cpp-python
    tar xf ik_llama_cpp_python-*.tar.gz && cd ik_llama_cpp_python-*/
    sed -i '/quantize)/d; /# Install llama-quantize/,$d' CMakeLists.txt
    sed -i '/add_subdirectory(common)/d; /cpp-httplib/d' vendor/ik_llama.cpp/CMakeLists.txt
    CMAKE_ARGS='-DGGML_NATIVE=ON -DCMAKE_INSTALL_RPATH=$ORIGIN' pip install .
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import shapes
import torch
from peers_table import section, sections, write

from engine.api import Model, load
from engine.benchmark import machine
from engine.benchmark.peers.known import KNOWN, chosen
from engine.benchmark.peers.process import Peer, PeerMissing, work_of
from engine.benchmark.speed import LEAST_AGREEMENT, agreement
from engine.benchmark.tables import setting_name
from engine.checkpoint import open_checkpoint
from engine.checkpoint.locate import locate
from engine.checkpoint.weights import describe, layer_weights
from engine.commands.common import check_writable
from engine.commands.output import refuse
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.generation import Options, Timings, generate
from engine.kernels import native
from engine.kernels.w4.cpu import isas
from engine.text import heldout_text

Workloads = Mapping[str, tuple[int, int]]  # tokens of the prompt, new ones

SMALL: Workloads = {"prefill": (512, 2), "decode": (16, 128), "context": (1024, 128)}
LARGE: Workloads = {"prefill": (512, 2), "decode": (16, 32)}  # a billion weights and more
CONTEXT = 1280  # of llama.cpp and ik_llama.cpp
JUDGED_WINDOWS = 8
EXTRA_SETTINGS = {"transformers": ({"dtype": "float32"}, {"dtype": "bfloat16"})}
WIDE = "avx512", "amx"  # of our instruction sets, those that peers with AVX-512 may be beside
# What holds oneDNN, which torch multiplies by, and torch's own kernels to a set.
LIMITS = {
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "avxvnni": {"ONEDNN_MAX_CPU_ISA": "AVX2_VNNI", "ATEN_CPU_CAPABILITY": "avx2"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
}


@dataclass
class Contender:
    """An engine in one setting; `run(prompt, new_tokens)` gives ids and times."""

    name: str
    setting: str
    version: str
    run: Callable[[Sequence[int], int], tuple[list[int], Timings]]
    runs: dict[str, list[Timings]] = field(default_factory=lambda: {w: [] for w in SMALL})
    agreement: float = 1.0

    @property
    def wrong(self) -> bool:
        return self.agreement < LEAST_AGREEMENT

    def tok_s(self, workload: str) -> float:
        """Median of the runs; of each run the prompt's rate or the median step's."""
        runs = self.runs[workload]
        rates = [run.prefill_tok_s if workload == "prefill" else run.decode_tok_s() for run in runs]
        return statistics.median(rate for rate in rates if rate is not None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a .gguf file")
    add = parser.add_argument
    add(
        "--shape",
        action="append",
        default=[],
        choices=shapes.FILES,
        help="also random weights in this model's shape; repeatable",
    )
    add("--isa", choices=isas(), default=isas()[0], help="what ours and the peers may use")
    add("--compare", default=",".join(KNOWN), help="the peers, by commas (default: all)")
    add(
        "--peer-python",
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="the interpreter of the environment that has this peer; repeatable",
    )
    add("--threads", type=shapes.positive, default=torch.get_num_threads(), help="of each engine")
    add("--repeats", type=shapes.positive, default=5, help="turns (default: 5)")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "cpu.md",
        help="the record whose section is written (default: benchmarks/results/cpu.md)",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        check_writable(options.out)
        sections(options.out)  # refused before the work
        asked = chosen(options.compare, options.peer_python)
        study = Study(options.isa, asked, options.repeats)
        with tempfile.TemporaryDirectory() as work:
            for _ in study.run(options.model, options.shape, Path(work)):
                write(options.out, study)  # a run of hours keeps what it has
        print(section(study))
    except InputError as error:
        refuse(error)


@dataclass
class Subject:
    """One file that all run, `contenders`, ours first; `gb_s`: passes of a read of as many bytes
    right before and after each of our decodes."""

    name: str
    bits: str
    model: Model
    workloads: Workloads
    alone: bool = True  # of its model
    nbytes: int = 0  # of weights, read for a token
    contenders: list[Contender] = field(default_factory=list)
    gb_s: list[list[float]] = field(default_factory=list)
    perplexity: float | None = None

    def best(self, name: str, workload: str) -> float | None:
        """Tokens a second of the fastest setting that gives this model's text."""
        speeds = [
            found.tok_s(workload)
            for found in self.contenders
            if found.name == name and not found.wrong
        ]
        return max(speeds, default=None)


class Study:
    """All files by one instruction set; `missing`: peer -> how to install it."""

    def __init__(self, isa: str, asked: dict[str, str | None], repeats: int) -> None:
        if isa != isas()[0] and isa not in LIMITS:
            raise InputError(f"--isa {isa}: nothing holds the peers to it")
        self.isa, self.asked, self.repeats = isa, asked, repeats
        self.missing: dict[str, str] = {}
        self.subjects: list[Subject] = []

    @property
    def threads(self) -> int:
        """That run, where more than there are CPUs were asked for."""
        return self.subjects[0].model.runtime.threads

    def run(self, ref: str, names: Sequence[str], work: Path) -> Iterator[Subject]:
        """Every file, as soon as it is measured."""
        path = locate(ref)
        judged = self._measured(ref, stored(path), path, SMALL)
        judged.perplexity = perplexity(judged.model)
        yield judged
        if self._quantize(judged.model, work / "Q4_0.gguf"):
            requantized = self._measured(ref, "Q4_0", work / "Q4_0.gguf", SMALL, alone=False)
            requantized.perplexity = perplexity(requantized.model)
            yield requantized
        for file in names:
            path = shapes.write(file, work)
            measured = self._measured(*shapes.bits_of(file), path, LARGE)
            measured.model.close()
            path.unlink()
            yield measured

    def _measured(
        self, name: str, bits: str, path: Path, workloads: Workloads, alone: bool = True
    ) -> Subject:
        """One warm-up turn, whose texts are compared with ours, then the measured ones."""
        print(f"{name}, {bits}, {self.isa}", file=sys.stderr)
        subject = Subject(name, bits, load(path, backend="cpu", isa=self.isa), workloads, alone)
        subject.nbytes = subject.model.runtime.weight_bytes_per_token
        with contextlib.ExitStack() as stack:
            subject.contenders.append(ours(subject.model))
            for peer in self.asked:
                if alone or KNOWN[peer].adapter == "llama":
                    with self._noted(peer, name if self.subjects else None):
                        subject.contenders += self._opened(peer, subject.model, stack)
            turns(subject, self.repeats)
        self.subjects.append(subject)
        return subject

    @contextlib.contextmanager
    def _noted(self, name: str, file: str | None = None) -> Iterator[None]:
        """A peer that is not installed is left out, unless its interpreter was named, and one that
        opens the first file but not `file` is left out there."""
        try:
            yield
        except PeerMissing as missing:
            if self.asked[name] is not None:
                raise
            self.missing[name] = str(missing)
            print(f"engine: {missing}", file=sys.stderr)
        except InputError as error:
            if file is None:
                raise
            self.missing[f"{name}, {file}"] = f"{file}: {error}"
            print(f"engine: {file}: {error}", file=sys.stderr)

    def _quantize(self, model: Model, path: Path) -> bool:
        if "llama.cpp" in self.asked:
            with self._noted("llama.cpp"):
                work = work_of("llama.cpp", model, 1, CONTEXT)
                with Peer("llama.cpp", self.asked["llama.cpp"], work) as peer:
                    peer.quantize(path, "Q4_0")
        return path.exists()

    def _opened(self, name: str, model: Model, stack: contextlib.ExitStack) -> Iterator[Contender]:
        limits = {} if self.isa == isas()[0] else LIMITS[self.isa]
        if limits and name == "openvino":
            self.missing[name] = (
                f"{name}: it takes all that the processor has (openvinotoolkit/openvino#38257)"
            )
            return
        for setting in EXTRA_SETTINGS.get(name, KNOWN[name].settings):
            work = work_of(name, model, 1, CONTEXT)
            peer = stack.enter_context(Peer(name, self.asked[name], work, setting, limits))
            if peer.wide and self.isa not in WIDE:
                raise InputError(
                    f"--isa {self.isa}: this {name} is built for AVX-512; build another as "
                    "benchmarks/peers.py says"
                )
            yield theirs(peer)


def stored(path: Path) -> str:
    """The types that the matrices of the first layer have in the file, such as "Q4_1"."""
    checkpoint = open_checkpoint(path)
    first = layer_weights(checkpoint, checkpoint.config, checkpoint.config.layers[0].layer)
    found = (describe(matrix) for _, matrix in first if len(matrix.shape) == 2)
    return ", ".join(dict.fromkeys(found))


def turns(subject: Subject, repeats: int) -> None:
    model, text = subject.model, subject.model.text
    ids = text.encode(heldout_text(), add_special=False)
    prompt, new_tokens = subject.workloads["decode"]
    for contender in subject.contenders:
        found, _ = contender.run(ids[:prompt], new_tokens)
        contender.agreement = agreement(model.runtime, ids[:prompt], found)
    reader = native.load("cpu").Reader(subject.nbytes, model.runtime.threads)

    def turn(contender: Contender, workload: str) -> None:
        prompt, new_tokens = subject.workloads[workload]
        passes = new_tokens // 2 if workload == "decode" and contender.name == "ours" else 0
        before = [reader.gb_s() for _ in range(passes)]
        _, timings = contender.run(ids[:prompt], new_tokens)
        contender.runs[workload].append(timings)
        if passes:
            subject.gb_s.append(before + [reader.gb_s() for _ in range(passes)])

    for _ in range(repeats):
        for workload in subject.workloads:
            for contender in subject.contenders:
                if not contender.wrong:
                    turn(contender, workload)


def perplexity(model: Model) -> float:
    return evaluate(model.runtime, model.text, heldout_text(), count=JUDGED_WINDOWS).perplexity


def ours(model: Model) -> Contender:
    def run(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Timings]:
        options = Options(max_new_tokens=new_tokens, ignore_eos=True)
        (result,) = generate(model.runtime, model.text, [list(prompt)], options)
        return list(result.token_ids), result.timings

    return Contender("ours", "", machine.commit() or machine.versions()["engine"], run)


def theirs(peer: Peer) -> Contender:
    def run(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Timings]:
        (ids,), timings = peer.generate([prompt], new_tokens)
        return ids, timings

    return Contender(peer.name, setting_name(peer.setting), peer.version, run)


if __name__ == "__main__":
    main()
