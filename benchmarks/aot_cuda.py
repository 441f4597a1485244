"""Compiles the CUDA kernels for GPUs that are not here, and reads what nvcc made of them."""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

from aot import Compiled, disassembled
from filelock import FileLock

ROOT = Path(__file__).parents[1]
MATMUL, ATTENTION = "csrc/cuda/w4_matmul.cu", "csrc/cuda/attention.cu"
# Bytes of shared memory that a launch asks for beside a kernel's own, at most.
DYNAMIC_BYTES = {MATMUL: 64 << 10, ATTENTION: 0}
# The parts of a kernel's name behind its own: dtype, bits, csrc/cuda/w4_params.h's Values, WHOLE.
CENTRED, SHIFTED = "Li4ELNS_6ValuesE0ELb1E", "Li4ELNS_6ValuesE1ELb1E"
REPORT = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def find_nvcc() -> str | None:
    """Where setup.py, which builds `engine._cuda`, looks for it, so that it is the same one."""
    home = os.environ.get("CUDA_HOME")
    package = Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    places = [f"{home}/bin"] if home else []
    places += [os.environ["PATH"], "/usr/local/cuda/bin", *map(str, package)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


@cache
def nvcc_version() -> str | None:
    """ "13.0"; None without nvcc."""
    if not (nvcc := find_nvcc()):
        return None
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"release (\S+),", said)[0]


@cache
def compiled(source: str, arch: int) -> dict[str, Compiled]:
    """The kernels of a file of csrc/cuda for sm_<arch>, by their mangled names; made anew where a
    source changed. `spill_bytes` counts stack frames too. Needs nvcc."""
    nvcc = find_nvcc()
    assert nvcc is not None
    flags = [f"-arch=sm_{arch}", *"-cubin -std=c++17 -O3 -Icsrc -Xptxas -v".split()]
    digest = hashlib.sha256(" ".join([*flags, str(nvcc_version())]).encode())
    for path in [ROOT / source, *sorted(ROOT.glob("csrc/**/*.h"))]:
        digest.update(path.read_bytes())
    name = f"{Path(source).stem}-{digest.hexdigest()[:16]}"
    cubin = ROOT / "build" / "cubin" / f"{name}.cubin"
    report = cubin.with_suffix(".txt")
    cubin.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cubin.with_suffix(".lock")):  # of several test workers one compiles
        if not report.exists():
            command = [nvcc, *flags, source, "-o", str(cubin)]
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
            assert ran.returncode == 0, ran.stderr
            assert "warning" not in ran.stderr.lower(), ran.stderr
            report.write_text(ran.stderr)
    machine = {
        section.partition(",")[0]: section
        for section in re.split(r"\n\s*\.section\s+\.text\.", disassembled(cubin))[1:]
    }
    return {
        name: Compiled(
            "", machine[name], int(registers), int(stack) + int(stores) + int(loads),
            sum(map(int, re.findall(r"(\d+) bytes smem", more))) + DYNAMIC_BYTES[source],
        )
        for name, stack, stores, loads, registers, more in REPORT.findall(report.read_text())
    }  # fmt: skip
