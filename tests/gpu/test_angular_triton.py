"""The Triton kernel: interpreted against the reference, and compiled for GPUs that are not here."""

import aot
import pytest
import torch
import triton
from support.angular_cases import CASES, DTYPES, boundaries
from support.interpreted import run_interpreted

from engine.kernels.angular import fused, reference

SIGNATURE = dict.fromkeys(["weights_ptr", "gram_ptr", "sums_ptr", "squares_ptr"], "*fp64")
SIGNATURE |= {"values_ptr": "*fp64", "stride_r": "i64", "stride_b": "i32"}
SIGNATURE |= {"R": "i32", "B": "i32", "D": "i32"}


def test_interpreted():
    run_interpreted("angular")


@pytest.mark.parametrize("arch", aot.FLOAT64_ARCHS)
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
    gram = compiled.ptx[compiled.ptx.rindex("mma.sync") :]
    gram = gram[: gram.index("ld.global")]  # what is written before other threads read it
    assert "bar.sync" in gram[gram.rindex("st.global") :]


def test_launch_table_covers_and_refuses():
    for R in range(2, 129):
        launch = fused.choose_launch(R)
        assert launch.TILE * launch.TILES >= R
    with pytest.raises(ValueError, match="up to 128 boundaries, found 129"):
        fused.choose_launch(129)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*CASES, (33, 300, 4096), (81, 5, 771)])
def test_on_a_gpu(rng, shape, dtype):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    x = boundaries(rng, *shape, dtype).cuda()
    weights = torch.rand(shape[1], generator=rng, dtype=torch.float64).cuda()
    weights[-1] = 0
    expected = reference.angular_sums(x, weights, values=True)
    got = fused.angular_sums(x, weights, values=True)
    assert (got.values - expected.values).abs().max() < 1e-7
    assert (got.sums - expected.sums).abs().max() < 1e-5
    assert torch.allclose(got.squares, expected.squares, rtol=1e-12)
