"""Compiles Triton kernels for GPUs that are not here, and reads what the assembler made of them."""

import re
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

ARCHS = (80, 86, 89, 90, 100, 120)
FLOAT64_ARCHS = (80, 90, 100)  # with float64 in their tensor cores
SHARED_LIMIT_BYTES = {  # a block's, opted in
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int  # of a thread
    spill_bytes: int  # stored and loaded, of a thread
    shared_bytes: int  # of a block

    def wide_loads(self) -> int:
        """Instructions that move 16 bytes a thread from global memory."""
        loads = r"ld\.global[\w.:]*\.v(4\.[bfus]32|2\.[bfus]64)"
        copies = r"cp\.async\.cg\.shared\.global[^;]*, 0x10"
        return len(re.findall(f"{loads}|{copies}", self.ptx))


def compile(
    kernel: JITFunction,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    odd: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    maxnreg: int | None = None,
) -> Compiled:
    """The kernel for sm_<arch>, with the arguments typed as in `{"x_ptr": "*fp16", "N": "i32"}`.

    Pointers and integers count as multiples of 16 but for those named in `odd`. Needs a process
    without TRITON_INTERPRET.
    """
    assert isinstance(kernel, JITFunction), "TRITON_INTERPRET was set when the kernel was imported"
    even = [name for name in signature if name not in odd and not signature[name].startswith("fp")]
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, dict(signature), dict(constexprs), attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults of later Triton versions
        built = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spill_bytes = _assemble(built.asm["ptx"], arch)
    return Compiled(built.asm["ptx"], registers, spill_bytes, built.metadata.shared)


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, from Triton's own assembler."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        gpu = f"--gpu-name={sm_arch_from_capability(arch)}"
        command = [get_ptxas(arch).path, "-v", gpu, source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    return int(re.search(r"Used (\d+) registers", done.stderr)[1]), sum(map(int, spills))
