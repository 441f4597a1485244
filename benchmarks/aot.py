"""Compiles Triton kernels for GPUs that are not here, and reads what the assembler made of them."""

import re
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton._utils import canonicalize_dtype
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

# Of a call that are not arguments.
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")
ARCHS = (80, 86, 89, 90, 100, 120)
FLOAT64_ARCHS = (80, 90, 100)  # with float64 in their tensor cores
SHARED_LIMIT_BYTES = {  # a block's, opted in
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    ptx: str
    sass: str
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
    launch_pdl: bool = False,
    enable_fp_fusion: bool = True,
) -> Compiled:
    """The kernel for sm_<arch>, with the arguments typed as in `{"x_ptr": "*fp16", "N": "i32"}`.

    Constants that are not given have their defaults. Pointers and integers count as multiples of 16
    but for those named in `odd`. Needs a process without TRITON_INTERPRET.
    """
    assert isinstance(kernel, JITFunction), "TRITON_INTERPRET was set when the kernel was imported"
    even = [name for name in signature if name not in odd and not signature[name].startswith("fp")]
    defaults = {p.name: p.default for p in kernel.params if p.is_constexpr and p.has_default}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in even}
    source = ASTSource(kernel, dict(signature), defaults | dict(constexprs), attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    options |= {"launch_pdl": launch_pdl, "enable_fp_fusion": enable_fp_fusion}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults of later Triton versions
        built = triton_compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    sass, registers, spill_bytes = _assemble(built.asm["ptx"], arch)
    return Compiled(built.asm["ptx"], sass, registers, spill_bytes, built.metadata.shared)


def compile_call(
    kernel: JITFunction, arguments: Sequence[Any], options: Mapping[str, Any], arch: int
) -> Compiled:
    """The kernel as a call with these arguments and options would compile it; tensors may be meta's
    and count as aligned."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | dict(options)
    launch = {name: given.pop(name) for name in OPTIONS if name in given}
    launch.setdefault("enable_fp_fusion", False)  # the default from Triton 3.10 on
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    odd: list[str] = []
    for parameter in kernel.params:
        value = given.pop(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None:
            constexprs[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{canonicalize_dtype(value.dtype)}"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 or parameter.do_not_specialize:
                odd.append(parameter.name)
    assert not given, f"{kernel.__name__} has no {sorted(given)}"
    return compile(kernel, signature, constexprs, arch, odd=tuple(odd), **launch)


def _assemble(ptx: str, arch: int) -> tuple[str, int, int]:
    """SASS, registers and spilled bytes of a thread, from Triton's own assembler."""
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        gpu = f"--gpu-name={sm_arch_from_capability(arch)}"
        command = [get_ptxas(arch).path, "-v", gpu, source, "-o", target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        sass = disassembled(target)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    return sass, int(registers), sum(map(int, spills))


def disassembled(cubin: Path) -> str:
    """By the nvdisasm of Triton's wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    command = [str(tool), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
