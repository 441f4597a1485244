"""The kernels of a decode step beside its matmuls: interpreted, and compiled for GPUs not here."""

import re
from dataclasses import replace

import aot
import pytest
import triton.language as tl
from support.interpreted import run_interpreted

from engine.kernels.layer.attention import attention_kernel
from engine.kernels.layer.stream import choose_kernel, embed_kernel, embed_plain_kernel
from engine.kernels.w4 import launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.gemv import gemv_kernel

G128 = Format("symmetric", 4, 128, even=True, asm=True)
G64 = Format("symmetric", 4, 64, even=True, asm=True)
ZERO = Format("zero", 4, 128, even=True, asm=True)
PLAIN = Format("plain", 16, 0, even=True, asm=True)
HALVES = {"fp16": tl.float16, "bf16": tl.bfloat16}
sm_90_first = [
    pytest.param(arch, marks=() if arch == 90 else pytest.mark.slow) for arch in aot.ARCHS
]
WEIGHTS = ("codes_ptr", "scales_ptr", "offsets_ptr", "supers_ptr", "codebook_ptr")


def test_interpreted():
    run_interpreted("layer")


def hold(compiled: aot.Compiled, arch: int, warps: int, loads: int = 1) -> None:
    assert compiled.spill_bytes == 0, f"{compiled.registers} registers"
    assert compiled.shared_bytes <= aot.SHARED_LIMIT_BYTES[arch]
    assert compiled.registers * 32 * warps <= 65536
    assert compiled.wide_loads() >= loads
    if (arrival := re.search(r"atom\.global\S*", compiled.ptx)) is None:
        return
    # Interpreted programs have one thread: here is seen that all have written, or may read.
    before, after = compiled.ptx[: arrival.start()], compiled.ptx[arrival.end() :]
    assert "acq_rel" in arrival[0]
    assert "bar.sync" in before[before.rindex("st.global") :], "a part may not be written yet"
    assert "bar.sync" in after[: after.index("ld.global")], "a part may be read too early"


def weight_types(kind: Format, dtype: str) -> dict[str, str | None]:
    if kind is PLAIN:
        return dict.fromkeys(WEIGHTS) | {"codes_ptr": f"*{dtype}"}
    offsets = "*u8" if kind is ZERO else None
    return dict.fromkeys(WEIGHTS) | {
        "codes_ptr": "*i32", "scales_ptr": "*fp16", "offsets_ptr": offsets,
    }  # fmt: skip


def build(kernel, types, constexprs, arch, odd=(), **options) -> aot.Compiled:
    """Pointers without a type are absent."""
    present = {name: kind for name, kind in types.items() if kind}
    absent = dict.fromkeys(name for name, kind in types.items() if not kind)
    return aot.compile(kernel, present, constexprs | absent, arch, odd=odd, **options)


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize("row", range(len(launch.GEMV_TABLE)))
@pytest.mark.parametrize(
    "kind, role",
    [
        *((G128, "qkv"), (ZERO, "gate_up"), (G128, "down"), (PLAIN, "head")),
        *((kind, "gemma") for kind in (G128, G64, PLAIN)),
    ],
)
def test_matmuls_of_a_step_compile(kind, role, row, arch):
    """What stands before and after the product leaves the loop without spills."""
    dtype, most = "bf16", launch.GEMV_TABLE[row][0]
    sizes = launch.step(most, 4096, 4096, kind, 132)
    extra = ("bias", "perm", "delta", "post", "stream", "norm", "norm_bias", "gate", "add", "live")
    extra += ("sums", "out_sums")
    types = weight_types(kind, dtype) | dict.fromkeys(f"{name}_ptr" for name in extra)
    types |= {"x_ptr": "*fp32", "y_ptr": f"*{dtype}", "norm_ptr": "*fp32"}
    types |= {"parts_ptr": "*fp32", "counters_ptr": "*i32", "sums_ptr": "*fp32"}
    types |= dict.fromkeys(("M", "N", "K", "stride_xm", "stride_ym", "tiles", "ranges"), "i32")
    types["epsilon"] = "fp32"
    more = {"NORM": "rms", "ACTIVATION": "", "CAP": 0.0, "GATED": role == "gate_up"}
    if role == "gate_up":
        more["ACTIVATION"] = "silu"
    elif role == "down":
        types |= {"x_ptr": f"*{dtype}", "norm_ptr": None, "add_ptr": "*fp32", "live_ptr": "*i32"}
        types["y_ptr"], more["NORM"] = "*fp32", ""
        types |= {"sums_ptr": None, "out_sums_ptr": "*fp32"}
    elif role == "head":
        types["y_ptr"], more["CAP"] = "*fp32", 30.0
    elif role == "gemma":
        types |= {"delta_ptr": "*fp32", "post_ptr": "*fp32", "stream_ptr": "*fp32"}
        types["sums_ptr"] = None
    constexprs = {"FORMAT": kind, "DTYPE": HALVES[dtype], "BLOCK_M": sizes.BLOCK_M}
    constexprs |= {"WARPS": sizes.WARPS, "CHUNKS": sizes.CHUNKS} | more
    compiled = build(
        gemv_kernel, types, constexprs, arch, odd=("M", "tiles", "ranges"),
        num_warps=sizes.WARPS, num_stages=sizes.num_stages, maxnreg=sizes.maxnreg,
    )  # fmt: skip
    hold(compiled, arch, sizes.WARPS)


@pytest.mark.parametrize("arch", sm_90_first)
@pytest.mark.parametrize(
    "heads, kv_heads, e, options",
    [
        (32, 8, 128, {}),
        (8, 4, 256, {"CAP": 50.0, "WINDOW": 4096, "SCOPE": "head"}),
        (32, 32, 80, {"NORM": "layer", "ROPE": 32}),
    ],
)
def test_attention_compiles(heads, kv_heads, e, options, arch):
    names = ("angles", "q_norm", "q_bias", "k_norm", "k_bias", "parts")
    types: dict[str, str | None] = {f"{name}_ptr": "*fp32" for name in names}
    types |= {"qkv_ptr": "*bf16", "store_ptr": "*bf16", "y_ptr": "*bf16"}
    types |= dict.fromkeys(("table_ptr", "positions_ptr", "live_ptr", "counters_ptr"), "*i32")
    types |= {"slot": "i32", "table_width": "i32", "epsilon": "fp32", "scale": "fp32"}
    if "SCOPE" not in options:
        types |= dict.fromkeys(f"{name}_ptr" for name in names[1:5])
    elif options.get("NORM") != "layer":
        types |= {"q_bias_ptr": None, "k_bias_ptr": None}
    constexprs = {
        "SLOTS": 32, "HEADS": heads, "KV_HEADS": kv_heads, "E": e, "BLOCK_R": 16, "PAGE": 64,
        "BLOCK_E": 1 << (e - 1).bit_length(), "ROPE": e, "NORM": "rms", "SCOPE": "", "WINDOW": 0,
        "CAP": 0.0, "SPLITS": 8, "WIDE": False,
    } | options  # fmt: skip
    odd = ("slot", "positions_ptr", "live_ptr")
    sizes = launch.attention(constexprs["BLOCK_E"])
    compiled = build(attention_kernel, types, constexprs, arch, odd, **sizes)
    hold(compiled, arch, 4, loads=2)


@pytest.mark.parametrize("arch", sm_90_first)
def test_embedding_and_choice_compile(arch):
    types = weight_types(ZERO, "bf16") | {"tokens_ptr": "*i32", "perm_ptr": None, "x_ptr": "*fp32"}
    types["sums_ptr"] = "*fp32"
    types |= {"factor": "fp32", "D": "i32"}
    constexprs = {"FORMAT": replace(ZERO, group=64), "DTYPE": tl.bfloat16}
    hold(build(embed_kernel, types, constexprs, arch, num_warps=2), arch, 2)
    plain = {"tokens_ptr": "*i32", "table_ptr": "*bf16", "x_ptr": "*fp32"}
    plain |= {"sums_ptr": "*fp32", "factor": "fp32", "D": "i32"}
    hold(build(embed_plain_kernel, plain, {"BLOCK_D": 1024}, arch), arch, 4)
    choice = {"logits_ptr": "*fp32", "ids_ptr": "*i32", "V": "i32"}
    hold(build(choose_kernel, choice, {"BLOCK_V": 8192}, arch, num_warps=16), arch, 16)
