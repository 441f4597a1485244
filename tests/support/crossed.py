"""The CPU runtime's decoder compiled for 64-bit ARM and run by an emulator, in its own process.

`Decoder` has the face of engine._cpu.Decoder, so that a `CpuRuntime` drives it unawares.
"""

import ctypes
import hashlib
import os
import shutil
import struct
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pybind11
from filelock import FileLock

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
FLAGS = "-std=c++17 -O2 -g0 -pthread -DSHALLOW_ARM -Icsrc".split()
PORTABLE = """decoder features isa kv_cache memory model plan product step step_attention
step_buffers step_choice step_products step_residual step_sizes threads w4_layout w4_matmul
rows_generic rows_neon attention_generic attention_neon w4_matmul_generic w4_matmul_neon""".split()
ENABLED = {"w4_matmul_dotprod": "+dotprod", "w4_matmul_i8mm": "+dotprod+i8mm"}
CPUS = {"neon": "cortex-a72", "dotprod": "neoverse-n1", "i8mm": "max"}  # what each is the best of
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "bool": 1, "uint8": 1}
QK_NORMS, ACTIVATIONS = ("", "head", "all"), ("silu", "gelu", "gelu_tanh", "relu")
CACHES, MODES, DTYPES = (
    ("float32", "float16", "int8"), ("int8", "exact"), ("float16", "bfloat16", "float32"),
)  # fmt: skip


def missing() -> str | None:
    """What is not installed, in words; None where all is."""
    lacks = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
    return f"no {' and no '.join(lacks)} (g++-aarch64-linux-gnu, qemu-user)" if lacks else None


def build() -> Path:
    """The program, linked whole as the emulator has no libraries; again where a source changed."""
    sources = ["tests/support/crossed.cpp", *(f"csrc/cpu/{name}.cpp" for name in PORTABLE)]
    sources += [f"csrc/cpu/{name}.cpp" for name in ENABLED]
    digest = hashlib.sha256(repr((FLAGS, ENABLED)).encode())
    for path in [*sources, *sorted(ROOT.glob("csrc/**/*.h"))]:
        digest.update((ROOT / path).read_bytes())
    folder = ROOT / "build" / "arm" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "decoder"

    def compile(source: str) -> Path:
        out = folder / f"{Path(source).stem}.o"
        march = ENABLED.get(out.stem)
        flags = [*FLAGS, *([f"-march=armv8.2-a{march}"] if march else [])]
        _run(COMPILER, *flags, "-c", source, "-o", str(out))
        return out

    with FileLock(folder / "lock"):  # of several test workers one compiles
        if not program.exists():
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile, sources))
            partial = folder / "partial"
            _run(COMPILER, "-static", "-pthread", *map(str, objects), "-o", str(partial))
            partial.rename(program)
    return program


def others() -> list[str]:
    """What setup.py compiles on ARM beside the program's files: bindings, and what they call."""
    x86 = {"avx2", "avxvnni", "avx512", "amx"}
    names = {path.stem for path in ROOT.glob("csrc/cpu/*.cpp")}
    return sorted(
        name for name in names - {*PORTABLE, *ENABLED} if name.rpartition("_")[2] not in x86
    )


def check(code: str) -> str | None:
    """What the compiler has against it, beside Python's headers, which are of this machine."""
    places = (pybind11.get_include(), sysconfig.get_path("include"))
    command = [COMPILER, *FLAGS, *(f"-I{place}" for place in places)]
    command += "-fsyntax-only -x c++ -".split()
    done = subprocess.run(
        command, input=code, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    return done.stderr if done.returncode else None


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def command(program: Path, isa: str, cpu: str | None = None) -> list[str]:
    return [EMULATOR, "-cpu", cpu or CPUS[isa], str(program), isa]


class Decoder:
    """One decoder, and its caches, in a process of its own."""

    def __init__(self, program: Path, ours: str, rules: dict[str, Any], isa: str, threads: int):
        """By `ours`, an instruction set of the other processor, whatever `isa` is of this one."""
        self.process = subprocess.Popen(
            command(program, ours), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.vocab, self.whole, self.caches, self.nbytes = rules["vocab_size"], False, 0, 1
        self._send("<7q", *(rules[name] for name in """hidden_size vocab_size heads kv_heads
            head_dim ffn_size max_context""".split()))  # fmt: skip
        self._send("<5f", *(rules[name] for name in """norm_eps attention_scale attention_softcap
            logit_softcap embedding_scale""".split()))  # fmt: skip
        self._send(
            "<7q", rules["norm"] == "layer", rules["gated"], rules["parallel"],
            QK_NORMS.index(rules["qk_norm"]), ACTIVATIONS.index(rules["activation"]),
            MODES.index(rules["mode"]), threads,
        )  # fmt: skip

    def set_outer(self, matrices, vectors, embedding, rows, columns) -> None:
        self._weights(matrices, vectors)
        self._send("<3q", rows, columns, 0 if embedding is None else DTYPES.index(embedding[2]))
        self._span(embedding)

    def add_layer(self, matrices, vectors, window, rope, rope_dim) -> None:
        self._send("<q", 1)  # there is one more
        self._weights(matrices, vectors)
        self._send("<3q", window, rope, rope_dim)

    def new_cache(self, dtype: str, batch: int) -> SimpleNamespace:
        return SimpleNamespace(
            batch=batch,
            nbytes=1,
            dtype=CACHES.index(dtype),
            place=None,
            reserve=lambda length: None,
        )

    def forward(self, cache, tokens, batch, steps, lengths, chosen, angles, everything, out) -> int:
        if not self.whole:
            self._send("<q", 0)
            self.whole = True
        if cache.place is None:
            cache.place, self.caches = self.caches, self.caches + 1
            self._send("<3q", cache.place, cache.dtype, cache.batch)
        else:
            self._send("<q", cache.place)
        self._send("<3q", batch, steps, everything)
        for span in (tokens, lengths, chosen):
            self._span(span, items=True)
        self._send("<q", len(angles))
        for table in angles:
            self._span(table, items=True)
        self.process.stdin.flush()
        (written,) = struct.unpack("<q", self._receive(8))
        ctypes.memmove(lengths[0], self._receive(lengths[1] * 8), lengths[1] * 8)
        ctypes.memmove(out[0], self._receive(written * self.vocab * 4), written * self.vocab * 4)
        return written

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _weights(self, matrices, vectors) -> None:
        self._send("<q", len(matrices))
        for role, matrix in matrices.items():
            self._bytes(role.encode())
            self._bytes(bytes(memoryview(matrix).cast("B")))
        self._send("<q", len(vectors))
        for role, span in vectors.items():
            self._bytes(role.encode())
            self._span(span, items=True)

    def _span(self, span, items: bool = False) -> None:
        """What engine.kernels.native.span() describes, preceded by its items or bytes."""
        if span is None:
            return self._send("<q", 0)
        address, count, dtype, _ = span
        nbytes = count * ITEM[dtype]
        self._send("<q", count if items else nbytes)
        self.process.stdin.write(ctypes.string_at(address, nbytes))
        return None

    def _bytes(self, data: bytes) -> None:
        self._send("<q", len(data))
        self.process.stdin.write(data)

    def _send(self, layout: str, *numbers) -> None:
        self.process.stdin.write(struct.pack(layout, *numbers))

    def _receive(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        assert len(data) == count, f"the program ended: {self.process.wait()}"
        return data


def decoders(program: Path, isa: str) -> Any:
    """What to put in the place of engine._cpu.Decoder."""
    return partial(Decoder, program, isa)
