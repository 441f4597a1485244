"""The Triton matmul: interpreted against float64, compiled for GPUs that are not here, launches."""

import re
from dataclasses import replace
from functools import cache

import aot
import pytest
import torch
import triton.language as tl
from cases import MATRICES
from support.interpreted import run_interpreted
from support.w4_calls import make

from engine.kernels import dispatch
from engine.kernels.w4 import fused, gemm, gemv, launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.format import Spec
from engine.kernels.w4.launch import DENSE, Launch, choose, step
from engine.kernels.w4.layout_gpu import to_gpu

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
UNUSED = ("perm_ptr", "delta_ptr", "post_ptr", "stream_ptr", "norm_ptr", "norm_bias_ptr")
UNUSED += ("gate_ptr", "add_ptr", "live_ptr", "sums_ptr", "out_sums_ptr")
HALVES = {"fp16": tl.float16, "bf16": tl.bfloat16}
G128 = SCHEMES["symmetric g128"]
REGISTERS = 65536  # of a multiprocessor
WIDE = aot.SHARED_LIMIT_BYTES[90]
WIDE_ARCHS = [arch for arch in aot.ARCHS if aot.SHARED_LIMIT_BYTES[arch] >= launch.WIDE_BYTES]
HINTED = (90, 100)  # where Triton 3.9 passes an eviction policy on to asynchronous copies
COPY = r"cp\.async\.\w+\.shared\.global[^;]*"
WIDE_COPY = re.compile(r"cp\.async\.cg[^;]*, 0x10")
RESERVED = 1024  # bytes of shared memory that CUDA takes a program
sm_90_first = [
    pytest.param(arch, marks=() if arch == 90 else pytest.mark.slow) for arch in aot.ARCHS
]


def weight_types(kind: Format) -> tuple[dict[str, str], dict[str, None]]:
    """The weight's pointers by type, and those that its scheme lacks."""
    offset = {"zero": "*u8", "minimum": "*fp16", "kquant": "*u8"}.get(kind.scheme)
    types = {
        "codes_ptr": "*i32",
        "scales_ptr": "*u8" if kind.scheme == "kquant" else "*fp16",
        "offsets_ptr": offset,
        "supers_ptr": "*fp16" if kind.scheme == "kquant" else None,
        "codebook_ptr": "*fp32" if kind.scheme == "codebook" else None,
    }
    present = {name: type for name, type in types.items() if type}
    return present, dict.fromkeys(types.keys() - present.keys())


@cache
def build(sizes: Launch, kind: Format, dtype: str, arch: int, gated: bool = False) -> aot.Compiled:
    """The kernel of `sizes`; `gated` with a bias."""
    types, constexprs = weight_types(kind)
    y = "*fp32" if sizes.SPLITS > 1 else f"*{dtype}"
    signature = types | {"x_ptr": f"*{dtype}", "y_ptr": y}
    signature |= dict.fromkeys(("M", "N", "K", "stride_xm"), "i32")
    if gated:
        signature["bias_ptr"] = f"*{dtype}"
    else:
        constexprs["bias_ptr"] = None
    constexprs |= {"FORMAT": kind, "GATED": gated, "WARPS": sizes.WARPS}
    constexprs["BLOCK_M"] = sizes.BLOCK_M
    kernel, odd = gemv.gemv_kernel, ("M",)
    if sizes.kernel == "gemv":
        signature |= {"parts_ptr": "*fp32", "counters_ptr": "*i32"}
        signature |= dict.fromkeys(("stride_ym", "tiles", "ranges"), "i32")
        odd += ("tiles", "ranges")
        constexprs["CHUNKS"] = step(sizes.BLOCK_M, 4096, 4096, kind, 132).CHUNKS
        constexprs |= dict.fromkeys(UNUSED) | {"DTYPE": HALVES[dtype], "epsilon": 0.0}
        constexprs |= {"NORM": "", "ACTIVATION": "silu" if gated else "", "CAP": 0.0}
    else:
        kernel, constexprs["SPLITS"] = gemm.gemm_kernel, sizes.SPLITS
    return aot.compile(
        kernel, signature, constexprs, arch, odd=odd,
        num_warps=sizes.WARPS, num_stages=sizes.num_stages, maxnreg=sizes.maxnreg,
    )  # fmt: skip


def codes_copies(sizes: Launch, kind: Format, dtype: str, arch: int, gated: bool) -> list[str]:
    """Of the asynchronous copies to shared memory, those of the codes.

    Scales of narrow groups are copied too, but codes alone are to leave the L2 first. Triton gives
    that hint on sm_90 and sm_100 alone; elsewhere the 16-byte copies are to be as many as there.
    """
    copies = re.findall(COPY, build(sizes, kind, dtype, arch, gated).ptx)
    if sizes.kernel != "gemv":
        return copies
    if arch in HINTED:
        return [copy for copy in copies if "cache_hint" in copy]
    wide = [copy for copy in copies if WIDE_COPY.match(copy)]
    hinted = codes_copies(sizes, kind, dtype, HINTED[0], gated)
    assert len(wide) >= len(hinted), f"{len(wide)} copies of 16 bytes, {len(hinted)} on sm_90"
    return wide


def hold(
    sizes: Launch, kind: Format, dtype: str, arch: int, programs: int, gated: bool = False
) -> aot.Compiled:
    """No spills, codes and x 16 bytes at a time, so many programs to a multiprocessor."""
    compiled = build(sizes, kind, dtype, arch, gated)
    assert compiled.spill_bytes == 0, f"{compiled.registers} registers"
    loop = compiled.ptx[compiled.ptx.index("cp.async.wait_group") : compiled.ptx.rindex("mma")]
    assert "shfl" not in loop, "weights move between threads"
    copies = codes_copies(sizes, kind, dtype, arch, gated)
    assert copies and all(WIDE_COPY.match(copy) for copy in copies), copies
    assert programs * compiled.registers * 32 * sizes.WARPS <= REGISTERS
    assert programs * (compiled.shared_bytes + RESERVED) <= aot.SHARED_LIMIT_BYTES[arch] + RESERVED
    return compiled


def table_of(arch: int) -> tuple[tuple[int, Launch], ...]:
    return launch.table(aot.SHARED_LIMIT_BYTES[arch])


@pytest.mark.parametrize("arch", [arch for arch in aot.ARCHS if arch not in WIDE_ARCHS])
def test_the_widest_rows_fit_a_narrow_device(arch):
    """99 KiB a block, where three stages of 128 rows of x would take 112."""
    most, sizes = table_of(arch)[-1]
    wide = build(launch.TABLE[-1][1], SCHEMES["symmetric g128"], "fp16", arch)
    assert wide.shared_bytes > aot.SHARED_LIMIT_BYTES[arch]
    hold(sizes, SCHEMES["symmetric g128"], "fp16", arch, programs=1)
    assert choose(most, 4096, 4096, G128, 128, aot.SHARED_LIMIT_BYTES[arch]).num_stages == 2


def test_interpreted():
    run_interpreted("w4")


@pytest.mark.slow
def test_interpreted_at_length():
    run_interpreted("w4", timeout_s=3600, marks="slow")


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize("row", range(len(launch.TABLE)))
def test_table_compiles(row, arch):
    most, sizes = table_of(arch)[row]
    two = sizes.kernel == "gemm" and most <= 64 and arch in WIDE_ARCHS
    compiled = hold(sizes, SCHEMES["symmetric g128"], "fp16", arch, programs=2 if two else 1)
    if arch == 90 and sizes.kernel == "gemm":
        from_registers = r"wgmma\.mma_async[^;]*\}, \{%r\d+,%r\d+,%r\d+,%r\d+\}"
        assert re.search(from_registers, compiled.ptx), "weights go through shared memory"


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gemv_of_every_scheme_compiles(scheme, dtype, arch):
    sizes = table_of(arch)[0][1]
    hold(sizes, SCHEMES[scheme], dtype, arch, programs=1)


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("dtype", ("fp16", "bf16"))
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("row", range(1, len(launch.TABLE)))
def test_table_compiles_with_every_scheme(row, scheme, dtype, arch):
    sizes = table_of(arch)[row][1]
    hold(sizes, SCHEMES[scheme], dtype, arch, programs=1)


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize(
    "row, gated, splits", ((0, True, 1), (3, True, 1), (2, False, 4), (4, True, 2))
)
def test_gates_and_splits_compile(row, gated, splits, arch):
    sizes = replace(table_of(arch)[row][1], SPLITS=splits)
    hold(sizes, SCHEMES["zero g16"], "bf16", arch, programs=1, gated=gated)


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize("gated", (False, True))
def test_reduction_compiles(gated, arch):
    signature = {
        "parts_ptr": "*fp32",
        "bias_ptr": "*fp16",
        "y_ptr": "*fp16",
        "M": "i32",
        "N": "i32",
    }
    constexprs = {"GATED": gated, "SPLITS": 4, "BLOCK_N": fused.REDUCE_BLOCK}
    compiled = aot.compile(gemm.reduce_kernel, signature, constexprs, arch, odd=("M",))
    assert compiled.spill_bytes == 0 and compiled.wide_loads() >= 4


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize("scheme", ("symmetric g128", "kquant"))
def test_dequantization_compiles(scheme, arch):
    types, constexprs = weight_types(SCHEMES[scheme])
    signature = types | {"w_ptr": "*bf16", "first": "i32", "N": "i32", "K": "i32"}
    constexprs |= {"FORMAT": SCHEMES[scheme], "WARPS": DENSE.WARPS}
    compiled = aot.compile(gemm.dense_kernel, signature, constexprs, arch, num_warps=DENSE.WARPS)
    assert compiled.spill_bytes == 0 and compiled.wide_loads() >= 2
    assert "st.global.v4" in compiled.ptx


@pytest.mark.parametrize("bits", (4, 8))
@pytest.mark.parametrize("n, k", ((1, 1), (512, 2048), *sorted(set(MATRICES.values()))))
def test_choice(n, k, bits):
    kind = Format("symmetric", bits, 128, even=True, asm=True)
    chunks = -(-k * bits // 512)
    for m in (*range(1, 130), 255, 256, 1023, 1024, 5000):
        sizes = choose(m, n, k, kind, 132, WIDE)
        if sizes.kernel == "gemv":
            ranges, slices, blocks = sizes.grid(m, n, k, kind, False)
            assert sizes.BLOCK_M >= m and blocks == 1
            assert (slices - 1) * sizes.CHUNKS < chunks <= slices * sizes.CHUNKS
            assert (ranges - 1) * sizes.TILES < -(-n // 128) <= ranges * sizes.TILES
        elif sizes.SPLITS > 1:
            assert chunks // sizes.SPLITS >= launch.SPLIT_CHUNKS
            assert 2 * 4 * sizes.SPLITS * m * n <= n * k * bits / 8 / 4  # bytes
    assert choose(launch.DENSE_ROWS - 1, n, k, kind, 132, WIDE).kernel == "gemm"
    assert choose(launch.DENSE_ROWS, n, k, kind, 132, WIDE) == DENSE


def test_needs_a_gpu(rng, monkeypatch):
    case = make(rng, Spec(4, 128, "symmetric"), torch.float16, 1, 16, 128)
    if not torch.cuda.is_available():
        with pytest.raises(dispatch.BackendUnavailable, match="backend triton: torch finds no GPU"):
            fused.matmul(case.x, to_gpu(case.packed))
        monkeypatch.setattr(dispatch, "require", lambda backend: None)
    with pytest.raises(ValueError, match="x must be on a GPU, found cpu"):
        fused.matmul(case.x, to_gpu(case.packed))
