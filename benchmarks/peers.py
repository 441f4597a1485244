"""Ours beside llama.cpp, ik_llama.cpp, OpenVINO and transformers on this CPU.

    python benchmarks/peers.py [--python NAME=PATH ...] [--peers NAMES] [--threads N]

All take turns within one run: the same model file, prompts and number of threads, every setting of
a peer that may be its fastest. llama.cpp and ik_llama.cpp also run the model as Q4_0, which the
first of them writes. Writes benchmarks/results/cpu.md.

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peers_table import write

from engine.api import Model, load
from engine.benchmark import machine
from engine.benchmark.peers.known import KNOWN, chosen
from engine.benchmark.peers.process import Peer, PeerMissing, work_of
from engine.benchmark.speed import LEAST_AGREEMENT, agreement
from engine.benchmark.tables import setting_name
from engine.checkpoint.locate import locate
from engine.commands.output import refuse
from engine.errors import InputError
from engine.evaluate import evaluate
from engine.generation import Options, Timings, generate
from engine.kernels import native
from engine.text import heldout_text

WORKLOADS = {"decode": (16, 128), "prefill": (512, 2), "context": (1024, 32)}  # prompt, new tokens
EXTRA_SETTINGS = {"transformers": ({"dtype": "float32"}, {"dtype": "bfloat16"})}


@dataclass
class Contender:
    """An engine in one setting on one file; `run(prompt, new_tokens)` gives ids and times."""

    name: str
    file: str
    setting: str
    version: str
    run: Callable[[Sequence[int], int], tuple[list[int], Timings]]
    runs: dict[str, list[Timings]] = field(default_factory=lambda: {w: [] for w in WORKLOADS})
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
    parser.add_argument("--peers", default=",".join(KNOWN))
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        asked = chosen(options.peers, options.python)
        with tempfile.TemporaryDirectory() as work, contextlib.ExitStack() as stack:
            study = Study(options.model, asked, Path(work), stack)
            study.run(options.repeats)
            write(options.out, study)
    except InputError as error:
        refuse(error)


class Study:
    """`contenders`, ours first; `missing`: peer -> how to install it; `gb_s`: reads measured."""

    context = 1280  # of llama.cpp and ik_llama.cpp
    judged_windows = 8

    def __init__(
        self, ref: str, asked: dict[str, str | None], work: Path, stack: contextlib.ExitStack
    ) -> None:
        self.asked, self._stack = asked, stack
        self.missing: dict[str, str] = {}
        self.gb_s: list[float] = []
        self.models = {"Q4_1": load(locate(ref), backend="cpu")}
        self.text = self.models["Q4_1"].text
        self.ids = self.text.encode(heldout_text(), add_special=False)
        self.repeats = 0
        if "llama.cpp" in asked and self._quantize(work / "Q4_0.gguf"):
            self.models["Q4_0"] = load(work / "Q4_0.gguf", backend="cpu")
        self.contenders = [ours(model, file) for file, model in self.models.items()]
        for name in asked:
            with self._noted(name):
                self.contenders += self._opened(name)

    @contextlib.contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """A peer that is not installed is left out, unless its interpreter was named."""
        try:
            yield
        except PeerMissing as missing:
            if self.asked[name] is not None:
                raise
            self.missing[name] = str(missing)
            print(f"engine: {missing}", file=sys.stderr)

    def _quantize(self, path: Path) -> bool:
        with self._noted("llama.cpp"):
            work = work_of("llama.cpp", self.models["Q4_1"], 1, self.context)
            with Peer("llama.cpp", self.asked["llama.cpp"], work) as peer:
                peer.quantize(path, "Q4_0")
        return path.exists()

    def _opened(self, name: str) -> Iterator[Contender]:
        files = self.models if KNOWN[name].adapter == "llama" else ["Q4_1"]
        for file in files:
            for setting in EXTRA_SETTINGS.get(name, KNOWN[name].settings):
                work = work_of(name, self.models[file], 1, self.context)
                peer = self._stack.enter_context(Peer(name, self.asked[name], work, setting))
                yield theirs(peer, file)

    def run(self, repeats: int) -> None:
        """One warm-up turn, whose texts are compared with ours, then the measured ones."""
        self.repeats = repeats
        for contender in self.contenders:
            prompt, new_tokens = WORKLOADS["decode"]
            ids, _ = contender.run(self.ids[:prompt], new_tokens)
            model = self.models[contender.file]
            contender.agreement = agreement(model.runtime, self.ids[:prompt], ids)
        for _ in range(repeats):
            self.gb_s.append(self._read_gb_s())
            for workload, (prompt, new_tokens) in WORKLOADS.items():
                for contender in self.contenders:
                    if not contender.wrong:
                        _, timings = contender.run(self.ids[:prompt], new_tokens)
                        contender.runs[workload].append(timings)

    def _read_gb_s(self) -> float:
        """Of a buffer of the model's size."""
        nbytes = self.models["Q4_1"].runtime.weight_bytes_per_token
        return native.load("cpu").read_bandwidth(nbytes, torch.get_num_threads())

    def perplexity(self, file: str) -> float:
        model = self.models[file]
        found = evaluate(model.runtime, self.text, heldout_text(), count=self.judged_windows)
        return found.perplexity


def ours(model: Model, file: str) -> Contender:
    def run(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Timings]:
        options = Options(max_new_tokens=new_tokens, ignore_eos=True)
        (result,) = generate(model.runtime, model.text, [list(prompt)], options)
        return list(result.token_ids), result.timings

    return Contender("ours", file, "", machine.commit() or machine.versions()["engine"], run)


def theirs(peer: Peer, file: str) -> Contender:
    def run(prompt: Sequence[int], new_tokens: int) -> tuple[list[int], Timings]:
        (ids,), timings = peer.generate([prompt], new_tokens)
        return ids, timings

    return Contender(peer.name, file, setting_name(peer.setting), peer.version, run)


if __name__ == "__main__":
    main()
