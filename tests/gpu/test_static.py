"""What compilers make of a step's kernels, as benchmarks/results/static.md says, and its bounds."""

import re

import aot_cuda
import pytest
import static
import triton
from aot import ARCHS, SHARED_LIMIT_BYTES

NVCC = aot_cuda.nvcc_version()
MOST = {"symmetric g128": 160, "zero g128": 190}  # instructions for a KiB of codes
LOOP = """
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   DEPBAR.LE SB0, 0x1 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R76], desc[UR5][R54.64], !P0 ;
        /*0060*/               @P1 LDG.E.EF.128.CONSTANT R12, desc[UR10][R22.64] ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   HMMA.16816.F32.BF16 R32, R24, R28, R32 ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_1) ;
"""


def hold(kernel: static.Kernel, arch: int) -> static.Row:
    """The row, within its bounds and as recorded, where by the same compiler."""
    row = static.row(kernel, arch)
    print(row)
    assert row.compiled.spill_bytes == 0
    assert row.compiled.shared_bytes <= SHARED_LIMIT_BYTES[arch]
    if kernel.by == "Triton" and arch >= static.OVERLAP_ARCH:  # of CUDA's the emulator sees to it
        first = re.search(r"(ld|st|atom|red)\.global|cp\.async", row.compiled.ptx)
        assert first is not None
        assert "griddepcontrol.wait" in row.compiled.ptx[: first.start()], "touches, then waits"
    if kernel.weights:
        assert row.loop is not None, "no loop loads codes 16 bytes a lane"
        assert row.loop.per_kib <= MOST[kernel.weights]
        assert row.loop.barriers <= 2
    recorded = static.RESULTS.read_text()
    compiler = f"Triton {triton.__version__} " if kernel.by == "Triton" else f"\n{NVCC}:"
    if compiler in recorded:
        assert str(row) in recorded.splitlines(), "benchmarks/static.py writes the table anew"
    return row


def test_a_loop_is_read():
    loop = static.main_loop(LOOP)
    assert loop == static.Loop(instructions=7, barriers=1, code_bytes=1024)
    assert loop.per_kib == 7
    assert static.main_loop(LOOP.replace(".128", ".64")) is None


def test_nvcc_is_asked_for_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr(aot_cuda, "nvcc_version", lambda: None)
    monkeypatch.setattr(static, "kernels", lambda _: pytest.fail("it was begun"))
    monkeypatch.setattr("sys.argv", ["static.py"])
    with pytest.raises(SystemExit) as ended:
        static.main()
    assert ended.value.code == 2 and "nvcc is neither on PATH nor" in capsys.readouterr().err


@pytest.mark.parametrize("weights", MOST)
def test_gate_and_up(weights):
    """What takes the most instructions."""
    (kernel,) = (k for k in static.kernels(90) if k.weights == weights and k.names == ["gate_up"])
    hold(kernel, 90)


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_cuda_kernels():
    for kernel in static.kernels(90):
        if kernel.by == "CUDA":
            hold(kernel, 90)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel(arch):
    every = static.kernels(arch)
    recorded = re.findall(rf"^\| sm_{arch} .*$", static.RESULTS.read_text(), re.MULTILINE)
    assert len(recorded) == len(every)
    for kernel in every:
        if kernel.by == "Triton" or NVCC:
            hold(kernel, arch)
