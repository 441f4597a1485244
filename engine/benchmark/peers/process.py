"""This side of a peer: starts its process, hands it work, stops it while others run."""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.api import Model
from engine.benchmark.peers.known import KNOWN, Setting
from engine.checkpoint.adapter import is_adapter
from engine.errors import InputError
from engine.generation import Timings
from engine.kernels.dtypes import name_of

TRIAL_TOKENS = 24
NO_SETTING: Setting = MappingProxyType({})
NO_ENVIRONMENT: Mapping[str, str] = MappingProxyType({})
# Left on the path, what lies beside this engine would hide the peer's own packages.
BOOT = (
    "import sys; root = sys.argv.pop(1); sys.path.insert(0, root); "
    "from engine.benchmark.peers import worker; sys.path.remove(root); worker.main(sys.argv[1])"
)
ROOT = str(Path(__file__).parents[3])
CLOSING_S = 5.0


class PeerMissing(InputError):
    """The peer's package does not import; the message says how to install it."""


class Peer:
    """Greedy decoding by another engine, in a process that is stopped unless it has work.

    A stopped process cannot spin, so an idle peer takes no time from whoever is measured.
    """

    def __init__(
        self,
        name: str,
        python: str | None,
        work: dict[str, Any],
        setting: Setting = NO_SETTING,
        environment: Mapping[str, str] = NO_ENVIRONMENT,
    ) -> None:
        """Opens `work` (see `Engine` of the adapters) under the interpreter `python`, with
        `environment` besides this process's own.

        Raises `PeerMissing`, and `InputError` for an interpreter or a model that does not open.
        """
        self.name, self.setting = name, dict(setting)
        self._errors = tempfile.TemporaryFile()
        # In a group of its own, a stopped process ends when this one dies without closing it.
        try:
            self._process = subprocess.Popen(
                [python or sys.executable, "-P", "-c", BOOT, ROOT, KNOWN[name].adapter],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
                | dict(environment),
                process_group=0,
            )
        except OSError as error:
            raise InputError(f"--peer-python {name}={python}: {error.strerror}") from error
        assert self._process.stdin is not None and self._process.stdout is not None  # pipes
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        try:
            reply = self._ask(name=name, setting=self.setting, **work)
            self.version: str = reply["version"]
            self.wide: bool | None = reply["wide"]  # built for AVX-512; None: it does not say
        except InputError:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> tuple[list[list[int]], Timings]:
        """Greedy ids (B, new_tokens), no stop token heeded, and the times of every step."""
        reply = self._ask(do="generate", prompts=list(map(list, prompts)), new_tokens=new_tokens)
        prefill_ms, steps = reply["prefill_ns"] / 1e6, tuple(reply["step_ns"])
        batch, prompt_tokens = len(prompts), sum(map(len, prompts))
        timings = Timings(prompt_tokens, prefill_ms, prefill_ms, steps, (batch,) * len(steps))
        return reply["ids"], timings

    def nll(self, ids: Sequence[int]) -> float:
        """Negative log-likelihood of ids[1:] given those before them, nats, summed."""
        return self._ask(do="nll", ids=list(ids))["nll"]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """The peer's own ids of every text; llama.cpp's alone."""
        return self._ask(do="tokenize", texts=list(texts))["ids"]

    def quantize(self, path: Path, kind: str) -> None:
        """Writes the opened model anew in GGUF type `kind`, "Q4_0" say."""
        self._ask(do="quantize", path=str(path), kind=kind)

    def close(self) -> None:
        process = self._process
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        try:
            process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._stdout.close()
        self._errors.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        line = b""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
            line = self._stdout.readline()
        if not line:
            raise InputError(f"--compare {self.name}: its process ended: {self._last_words()}")
        self._process.send_signal(signal.SIGSTOP)
        reply = json.loads(line)
        if "missing" in reply:
            raise PeerMissing(f"{self.name}: {reply['missing']}; {KNOWN[self.name].install}")
        if "error" in reply:
            raise InputError(f"--compare {self.name}: {reply['error']}")
        return reply

    def _last_words(self) -> str:
        self._process.wait(CLOSING_S)
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {self._process.returncode}"


def work_of(name: str, model: Model, batch: int, context: int) -> dict[str, Any]:
    """What a `Peer` opens to do as `model` does with `batch` sequences of `context` tokens."""
    config, runtime = model.config, model.runtime
    layers = [entry.layer for entry in config.layers]
    if KNOWN[name].gguf_only:
        if model.path.suffix != ".gguf":
            raise InputError(f"--compare {name}: expected a .gguf file, found {model.path}")
        if len(layers) != config.total_layers:
            raise InputError(f"--compare {name} runs every layer of a file: drop none")
        if batch != 1:
            raise InputError(f"--compare {name} runs one sequence: expected --batch 1, not {batch}")
    if is_adapter(model.path):  # peers would look for its base elsewhere
        raise InputError(
            f"--compare {name}: expected a whole model, found an adapter, {model.path}; `engine "
            "export --to hf` makes one of it"
        )
    return {
        "model": str(model.path),
        "threads": runtime.threads,
        "context": context,
        "layers": layers,
        "device": str(runtime.device),
        "dtype": name_of(runtime.dtype),
    }


def fastest(name: str, python: str | None, work: dict[str, Any], prompt: Sequence[int]) -> Peer:
    """The peer in the setting that decodes fastest after `prompt`; raises what `Peer` raises."""
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(Peer(name, python, work, setting))
            for setting in KNOWN[name].settings
        ]
        if len(opened) > 1:
            opened.sort(key=lambda peer: _trial_ns(peer, prompt))
        stack.pop_all()
    for slower in opened[1:]:
        slower.close()
    return opened[0]


def _trial_ns(peer: Peer, prompt: Sequence[int]) -> float:
    peer.generate([prompt], 2)
    return statistics.median(peer.generate([prompt], TRIAL_TOKENS)[1].step_ns)
