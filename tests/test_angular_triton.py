"""The Triton kernel: interpreted against the reference, and compiled for GPUs that are not here."""

import aot
import pytest
import triton
from interpreted import run_interpreted

from engine.kernels.angular import fused

SIGNATURE = dict.fromkeys(["weights_ptr", "gram_ptr", "sums_ptr", "squares_ptr"], "*fp64")
SIGNATURE |= {"values_ptr": "*fp64", "stride_r": "i64", "stride_b": "i32"}
SIGNATURE |= {"R": "i32", "B": "i32", "D": "i32"}


def test_interpreted():
    run_interpreted("angular")


@pytest.mark.parametrize("arch", aot.ARCHS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("most", fused.LAUNCHES)
def test_compiles_without_spills(arch, dtype, most):
    launch = fused.choose_launch(most)
    constexprs = {"TILE": launch.TILE, "TILES": launch.TILES, "BLOCK_D": launch.BLOCK_D}
    compiled = aot.compile(
        fused.angular_kernel,
        {"x_ptr": f"*{dtype}"} | SIGNATURE,
        constexprs | {"COLUMNS": triton.next_power_of_2(most), "VALUES": False},
        arch,
        odd=("R", "B"),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    assert compiled.spill_bytes == 0, f"{compiled.registers} registers"
    assert compiled.wide_loads() > 0
    assert "mma.sync.aligned.m8n8k4.row.col.f64" in compiled.ptx
    assert compiled.shared_bytes <= aot.SHARED_LIMIT_BYTES[arch] // fused.PROGRAMS_PER_CORE


def test_launch_table_covers_and_refuses():
    for boundaries in range(2, 129):
        launch = fused.choose_launch(boundaries)
        assert launch.TILE * launch.TILES >= boundaries
    with pytest.raises(ValueError, match="up to 128 boundaries, found 129"):
        fused.choose_launch(129)
