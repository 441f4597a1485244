"""What compilers make of the kernels of a decode step, for GPUs that are not here: a table of
registers, shared memory and instructions.

    python benchmarks/static.py [--out FILE]     # benchmarks/results/static.md

The kernels are those that the list of launches holds (engine/runtime/gpu_step.py, on meta tensors),
the numbers those of the machine code: no GPU takes part, and nothing here is a speed.
"""

import argparse
import re
import sys
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import aot_cuda
import triton
from aot import ARCHS, OPTIONS, Compiled, compile_call
from roofline import G128, MODELS, step
from triton.runtime.jit import JITFunction

from engine.commands.common import check_writable
from engine.commands.output import refuse
from engine.errors import InputError
from engine.kernels.layer import cuda as layer_cuda
from engine.kernels.w4 import cuda as w4_cuda
from engine.kernels.w4.format import Spec
from engine.runtime import GPU_RUNTIMES
from engine.runtime.gpu_step import Launch
from engine.scratch import write_text

RESULTS = Path(__file__).parent / "results" / "static.md"
SPECS = {"symmetric g128": G128, "zero g128": Spec(4, 128, "zero")}
SHAPES = ("Llama-3-8B", "Llama-2-70B")
OVERLAP_ARCH = 90  # from here on the kernels of a step overlap
PRODUCTS = ("qkv", "o", "gate_up", "down", "head")
WIDE = re.compile(r"\b(LDG|LDGSTS)\.[\w.]*\b128\b")  # loads of 16 bytes a lane from global memory
BARRIER = re.compile(r"^(@!?U?P\d+ )?BAR\.")
MATRIX = re.compile(r"\b(HMMA|IMMA|HGMMA)\.")
WARP_BYTES = 32 * 16  # that one wide load of a warp reads


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop of a kernel, by a warp."""

    instructions: int
    barriers: int
    code_bytes: int  # read by wide loads

    @property
    def per_kib(self) -> float:
        """Instructions for each KiB of codes."""
        return self.instructions / (self.code_bytes / 1024)


def instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """A kernel's instructions without their addresses, and where labels point among them."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            found.append(instruction[1])
    return found, labels


def loops(sass: str) -> Iterator[list[str]]:
    """The bodies of loops: what lies between a branch backwards and where it goes."""
    found, labels = instructions(sass)
    for end, instruction in enumerate(found):
        target = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", instruction)
        if target and labels.get(target[1], end) < end:
            yield found[labels[target[1]] : end + 1]


def main_loop(sass: str) -> Loop | None:
    """The shortest loop that loads codes 16 bytes a lane and multiplies on tensor cores."""
    bodies = [
        body
        for body in loops(sass)
        if any(map(WIDE.search, body)) and any(map(MATRIX.search, body))
    ]
    if not bodies:
        return None
    body = min(bodies, key=len)
    wide = sum(bool(WIDE.search(each)) for each in body)
    barriers = sum(bool(BARRIER.search(each)) for each in body)
    return Loop(len(body), barriers, wide * WARP_BYTES)


@dataclass
class Kernel:
    """Launches that are compiled as one: `launch` is one of them."""

    launch: Launch
    by: str  # "Triton" or "CUDA"
    weights: str  # one of SPECS, "" without any
    names: list[str]
    shapes: list[str]


@cache
def kernels(arch: int) -> list[Kernel]:
    """Those of a step of 1 to 8 sequences, which split contexts as eight do: all of Triton's, and
    ours in CUDA."""
    found: dict[tuple[Hashable, ...], Kernel] = {}
    for backend, shape, (label, spec) in product(GPU_RUNTIMES, SHAPES, SPECS.items()):
        launches = step(
            MODELS[shape], batch=8, slots=[0], spec=spec, backend=backend,
            overlaps=arch >= OVERLAP_ARCH,
        ).launches  # fmt: skip
        for launch in launches:
            by = "Triton" if isinstance(launch.kernel, JITFunction) else "CUDA"
            weights = label if launch.name in PRODUCTS else ""
            key = (by, weights, *variant(launch))
            kernel = found.setdefault(key, Kernel(launch, by, weights, [], []))
            if launch.name not in kernel.names:
                kernel.names.append(launch.name)
            if shape not in kernel.shapes:
                kernel.shapes.append(shape)
    return list(found.values())


def variant(launch: Launch) -> list[Hashable]:
    """What two launches of one kernel are compiled apart for."""
    if not isinstance(launch.kernel, JITFunction):
        return list(source_of(launch))
    given = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.options
    constant = [p.name for p in launch.kernel.params if p.is_constexpr]
    kinds = [(name, getattr(value, "dtype", None)) for name, value in sorted(given.items())]
    options = [given.get(name) for name in OPTIONS]
    return [launch.kernel.__name__, *kinds, *options, *map(given.get, constant)]


def source_of(launch: Launch) -> tuple[str, str]:
    """Of a CUDA kernel the file, and what of its name tells it from the others there."""
    call = launch.arguments[0]
    if launch.kernel is layer_cuda.launch:
        return aot_cuda.ATTENTION, f"13__nv_bfloat16Li{call.width}E"
    assert launch.kernel is w4_cuda.launch
    template = aot_cuda.SHIFTED if call.borrowed.get("zeros") is not None else aot_cuda.CENTRED
    return aot_cuda.MATMUL, f"13__nv_bfloat16{template}"


@dataclass(frozen=True)
class Row:
    """A kernel compiled for one target."""

    arch: int
    kernel: Kernel
    compiled: Compiled
    loop: Loop | None  # of a product

    def __str__(self) -> str:
        kernel, found, loop = self.kernel, self.compiled, ("-", "-")
        if self.loop is not None:
            loop = (f"{self.loop.per_kib:.0f}", str(self.loop.barriers))
        cells = (
            f"sm_{self.arch}", kernel.by, ", ".join(kernel.names), kernel.weights or "-",
            ", ".join(kernel.shapes), str(found.registers), str(found.spill_bytes),
            f"{found.shared_bytes / 1024:.1f}", *loop,
        )  # fmt: skip
        return f"| {' | '.join(cells)} |"


def row(kernel: Kernel, arch: int) -> Row:
    launch = kernel.launch
    if kernel.by == "CUDA":
        source, part = source_of(launch)
        found = aot_cuda.compiled(source, arch)
        (compiled,) = (kernel for name, kernel in found.items() if part in name)
    else:
        compiled = compile_call(launch.kernel, launch.arguments, launch.options, arch)
    return Row(arch, kernel, compiled, main_loop(compiled.sass) if kernel.weights else None)


HEAD = f"""# What compilers make of the kernels

By `python benchmarks/static.py`, with Triton {triton.__version__} and its assembler and nvcc
{aot_cuda.nvcc_version()}: no GPU takes part. The kernels of a decode step of 1 to 8 sequences,
bfloat16, in the shapes of Llama-3-8B and Llama-2-70B, one row for each that is compiled apart.
From sm_90 on they overlap. Spills: bytes of a thread. Shared memory:
KiB of a block. Instructions: of a warp, over one iteration of the main loop, for each KiB of codes
that it reads, 16 bytes a lane; barriers: in one iteration. What a KiB takes at the full speed of
memory is about 283 issue slots on an H100, 198 on an H200, 140 on a B200.

| target | by | kernel | weights | shapes | registers | spills | shared | instructions | barriers |
|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: results/static.md")
    out = parser.parse_args().out
    try:
        check_writable(out)
        if aot_cuda.nvcc_version() is None:
            raise InputError("nvcc is neither on PATH nor in CUDA_HOME")
    except InputError as error:
        refuse(error)
    lines = []
    for arch in ARCHS:
        for kernel in kernels(arch):
            lines.append(str(row(kernel, arch)))
            print(lines[-1], file=sys.stderr, flush=True)
    write_text(out, HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
