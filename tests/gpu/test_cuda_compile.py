"""What nvcc makes of the CUDA kernels: registers, spills, shared memory, 16-byte loads."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from aot import disassembled
from filelock import FileLock
from static import main_loop

ROOT = Path(__file__).parents[2]
SOURCE = "csrc/cuda/w4_matmul.cu"
# 2 dtypes x (4 bits: centred, plain, table, and with a group a chunk shifted too; 8 bits: 2)
KERNELS = 18
MOST = {"0ELb1": 160, "1ELb1": 190}  # instructions for a KiB of codes: symmetric, zero point
MAX_REGISTERS = 65536 // (2 * 256)  # two blocks of 256 threads to a multiprocessor
X_BYTES = (64 << 10) + 960  # the most that a block holds of x
SHARED_BYTES = {  # of a multiprocessor
    80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10,
}  # fmt: skip
TARGETS = [
    pytest.param(target, marks=() if target == 90 else pytest.mark.slow) for target in SHARED_BYTES
]


def find(tool: str) -> str | None:
    """An executable of CUDA, on PATH, in CUDA_HOME or in triton's package."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    triton = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin")
    return shutil.which(
        tool, path=os.pathsep.join([os.environ["PATH"], f"{home}/bin", str(triton)])
    )


@pytest.fixture(scope="module")
def compiled(request) -> tuple[Path, str]:
    """The cubin for a target and ptxas's report; made anew where a source changed."""
    nvcc, target = find("nvcc"), request.param
    if not nvcc:
        pytest.skip("no nvcc")
    flags = [f"-arch=sm_{target}", *"-cubin -std=c++17 -O3 -Icsrc -Xptxas -v".split()]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in [ROOT / SOURCE, *sorted(ROOT.glob("csrc/**/*.h"))]:
        digest.update(path.read_bytes())
    cubin = ROOT / "build" / "cubin" / f"w4-{digest.hexdigest()[:16]}.cubin"
    report = cubin.with_suffix(".txt")
    cubin.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cubin.with_suffix(".lock")):  # of several test workers one compiles
        if not report.exists():
            ran = subprocess.run(
                [nvcc, *flags, SOURCE, "-o", str(cubin)],
                cwd=ROOT, capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            assert ran.returncode == 0, ran.stderr
            assert "warning" not in ran.stderr.lower(), ran.stderr
            report.write_text(ran.stderr)
    return cubin, report.read_text()


def numbers(pattern: str, report: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, report)]
    assert len(found) == KERNELS, f"{len(found)} of {KERNELS} kernels say {pattern!r}:\n{report}"
    return found


def each_target(test):
    return pytest.mark.parametrize("compiled", TARGETS, indirect=True)(test)


@each_target
def test_nothing_spills_and_blocks_fit(compiled, request):
    report = compiled[1]
    for what in ("bytes stack frame", "bytes spill stores", "bytes spill loads"):
        assert set(numbers(rf"(\d+) {what}", report)) == {0}, what
    assert max(numbers(r"Used (\d+) registers", report)) <= MAX_REGISTERS
    static = max(numbers(r"(\d+) bytes smem", report))
    reserved = 1024  # by CUDA, a block
    limit = SHARED_BYTES[request.node.callspec.params["compiled"]]
    blocks = 2 if limit > 128 << 10 else 1  # of the longest rows; shorter ones leave room for two
    assert blocks * (static + X_BYTES + reserved) <= limit


@each_target
def test_weights_arrive_in_16_byte_loads(compiled):
    cuobjdump = find("cuobjdump")
    if not cuobjdump:
        pytest.skip("no cuobjdump: it comes with CUDA and with triton")
    sass = subprocess.run(
        [cuobjdump, "-sass", str(compiled[0])], capture_output=True, text=True, timeout=300
    ).stdout
    kernels = sass.split("Function : ")[1:]
    assert len(kernels) == KERNELS
    for kernel in kernels:
        name = kernel.split()[0]
        wide = re.findall(r"LDG\.E[\w.]*\.128", kernel)
        assert len(wide) >= 16, f"{name}: {len(wide)} wide loads; 4 chunks x 2 rows, twice"
        assert "HMMA" in kernel, f"{name}: no tensor core instruction"
        assert not re.search(r"\b(LDL|STL)\b", kernel), f"{name}: local memory"


@each_target
def test_groups_of_a_chunk_take_few_instructions(compiled):
    kernels = re.split(r"\n\s*\.section\s+\.text\.", disassembled(compiled[0]))[1:]
    found = 0
    for kernel in kernels:
        name = kernel.partition(",")[0]
        for variant, most in MOST.items():
            if f"Li4ELNS_6ValuesE{variant}" not in name:
                continue
            loop = main_loop(kernel)
            assert loop is not None and loop.barriers == 0, name
            print(name, loop.per_kib)
            assert loop.per_kib <= most, f"{name}: {loop.per_kib}"
            found += 1
    assert found == 4
