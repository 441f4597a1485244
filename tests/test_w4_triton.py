"""The Triton matmul: interpreted against float64, compiled for GPUs that are not here, launches."""

import re
from functools import cache

import aot
import pytest
from interpreted import run_interpreted

from engine.kernels.w4 import gemm, gemv, launch
from engine.kernels.w4.dequantise import Format
from engine.kernels.w4.launch import Launch

SCHEMES = {  # each with the group whose scales need most registers
    "symmetric g128": Format("symmetric", 4, 128, even=True, asm=True),
    "symmetric g32": Format("symmetric", 4, 32, even=True, asm=True),
    "zero g16": Format("zero", 4, 16, even=True, asm=True),
    "minimum g32, K of half a step": Format("minimum", 4, 32, even=False, asm=True),
    "nf4 g64": Format("codebook", 4, 64, even=True, asm=True),
    "kquant": Format("kquant", 4, 32, even=True, asm=True),
    "symmetric 8 bits, row": Format("symmetric", 8, 0, even=True, asm=True),
    "minimum 8 bits g16": Format("minimum", 8, 16, even=True, asm=True),
}
POINTERS = ("scales_ptr", "offsets_ptr", "supers_ptr", "codebook_ptr")
REGISTERS = 65536  # of a multiprocessor
fast_90 = [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in aot.ARCHS if arch != 90)]


@cache
def build(
    kernel: str, sizes: Launch, kind: Format, dtype: str, arch: int, gated: bool = False
) -> aot.Compiled:
    scale, offset = ("u8", "u8") if kind.scheme == "kquant" else ("fp16", "fp16")
    types = {"x_ptr": dtype, "codes_ptr": "i32", "scales_ptr": scale, "y_ptr": dtype}
    if kind.scheme in ("zero", "minimum", "kquant"):
        types["offsets_ptr"] = "u8" if kind.scheme == "zero" else offset
    if kind.scheme == "kquant":
        types["supers_ptr"] = "fp16"
    if kind.scheme == "codebook":
        types["codebook_ptr"] = "fp32"
    if gated:
        types["bias_ptr"] = dtype
    if sizes.SPLITS > 1:
        types["y_ptr"] = "fp32"
    constexprs = {name: None for name in (*POINTERS, "bias_ptr") if name not in types}
    constexprs |= {"FORMAT": kind, "GATED": gated, "WARPS": sizes.WARPS}
    constexprs |= {"BLOCK_M": sizes.BLOCK_M}
    function = gemv.gemv_kernel
    if kernel == "gemm":
        function, constexprs = gemm.gemm_kernel, constexprs | {"SPLITS": sizes.SPLITS}
    signature = {name: f"*{type}" for name, type in types.items()}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm"), "i32")
    return aot.compile(
        function, signature, constexprs, arch, odd=("M",),
        num_warps=sizes.WARPS, num_stages=sizes.num_stages,
    )  # fmt: skip


def test_interpreted():
    run_interpreted("w4")


def hold(compiled: aot.Compiled, sizes: Launch, arch: int, programs: int) -> None:
    """No spills, 16-byte loads, and so many programs to a multiprocessor."""
    assert compiled.spill_bytes == 0, f"{compiled.registers} registers"
    assert compiled.wide_loads() >= 2
    assert programs * compiled.registers * 32 * sizes.WARPS <= REGISTERS
    assert programs * (compiled.shared_bytes + 1024) <= aot.SHARED_LIMIT_BYTES[arch] + 1024


@pytest.mark.parametrize("arch", fast_90)
@pytest.mark.parametrize("most, sizes", launch.TABLE)
def test_table_compiles(most, sizes, arch):
    compiled = build(sizes.kernel, sizes, SCHEMES["symmetric g128"], "fp16", arch)
    hold(compiled, sizes, arch, programs=2 if most <= 64 else 1)
    print(sizes, arch, compiled.registers, compiled.shared_bytes)
    if arch == 90 and sizes.kernel == "gemm":
        from_registers = r"wgmma\.mma_async[^;]*\}, \{%r\d+,%r\d+,%r\d+,%r\d+\}"
        assert re.search(from_registers, compiled.ptx), "weights go through shared memory"


@pytest.mark.parametrize("arch", fast_90)
@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gemv_of_every_scheme_compiles(scheme, dtype, arch):
    sizes = launch.TABLE[0][1]
    hold(build("gemv", sizes, SCHEMES[scheme], dtype, arch), sizes, arch, programs=2)
