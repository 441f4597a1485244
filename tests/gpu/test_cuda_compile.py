"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, 16-byte loads."""

import re

import aot_cuda
import pytest
from aot import ARCHS, SHARED_LIMIT_BYTES, Compiled
from static import main_loop

# 2 dtypes x (4 bits: centred, plain, table, and with a group a chunk shifted too; 8 bits: 2), and
# x 3 widths of heads.
KERNELS = {aot_cuda.MATMUL: 18, aot_cuda.ATTENTION: 6}
THREADS = {aot_cuda.MATMUL: 512, aot_cuda.ATTENTION: 128}
MOST = {aot_cuda.CENTRED: 160, aot_cuda.SHIFTED: 190}  # instructions for a KiB of codes
REGISTERS, BLOCK_REGISTERS = 255, 65536
SLOWLY = [pytest.param(arch, marks=() if arch == 90 else pytest.mark.slow) for arch in ARCHS]


def kernels(source: str, arch: int) -> dict[str, Compiled]:
    if not aot_cuda.find_nvcc():
        pytest.skip("no nvcc")
    found = aot_cuda.compiled(source, arch)
    assert len(found) == KERNELS[source], list(found)
    return found


@pytest.mark.parametrize("arch", SLOWLY)
@pytest.mark.parametrize("source", KERNELS)
def test_nothing_spills_and_blocks_fit(source, arch):
    for name, kernel in kernels(source, arch).items():
        assert kernel.spill_bytes == 0, name
        assert kernel.registers * THREADS[source] <= BLOCK_REGISTERS, name
        assert kernel.registers <= REGISTERS, name
        assert kernel.shared_bytes <= SHARED_LIMIT_BYTES[arch], name
        assert "HMMA" in kernel.sass, f"{name}: no tensor core instruction"
        assert not re.search(r"\b(LDL|STL)\b", kernel.sass), f"{name}: local memory"


@pytest.mark.parametrize("arch", SLOWLY)
def test_weights_arrive_in_16_byte_loads(arch):
    for name, kernel in kernels(aot_cuda.MATMUL, arch).items():
        loop = main_loop(kernel.sass)
        assert loop is not None and loop.code_bytes >= 1024, name
        assert loop.barriers == 0, name
        for variant, most in MOST.items():
            if variant in name:
                print(name, loop.per_kib)
                assert loop.per_kib <= most, f"{name}: {loop.per_kib}"
    assert all(sum(v in name for name in kernels(aot_cuda.MATMUL, arch)) == 2 for v in MOST)


@pytest.mark.parametrize("arch", SLOWLY)
def test_keys_and_values_arrive_in_16_byte_loads(arch):
    """Those of 16 positions: a key is read by 4 lanes, a value by 8."""
    for name, kernel in kernels(aot_cuda.ATTENTION, arch).items():
        width = int(re.findall(r"Li(\d+)E", name)[0])
        wide = re.findall(r"LDG\.E[\w.]*\.128", kernel.sass)
        assert len(wide) >= 2 * width / 32 + 4 * width / 64, f"{name}: {len(wide)}"
