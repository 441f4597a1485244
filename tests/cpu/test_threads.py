"""The native thread pool (csrc/cpu/threads.h), plain and under sanitizers."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from engine.kernels import native

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/support/threads_check.cpp", "csrc/cpu/threads.cpp")


def build(folder: Path, *flags: str) -> Path:
    """Compiles the assertions with `flags`."""
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    program = folder / "check"
    compiler = ["c++", "-std=c++17", "-O2", "-g", "-pthread", "-Icsrc", *flags]
    built = subprocess.run(
        [*compiler, *SOURCES, "-o", program], cwd=ROOT, capture_output=True, text=True
    )
    if built.returncode and flags:
        pytest.skip(f"this compiler lacks {flags}: {built.stderr.splitlines()[-1]}")
    assert built.returncode == 0, built.stderr
    return program


def run(program: Path, mode: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [program, mode, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_regions_barriers_and_loops(tmp_path):
    ran = run(build(tmp_path), "fork")
    assert ran.returncode == 0, ran.stderr


SECOND = "0::/a/b\n"
FIRST = "9:name=systemd:/a/b\n3:cpuset:/x\n2:cpu,cpuacct:/a/b\n0::/\n"


def test_what_control_groups_leave_of_the_cpus(tmp_path):
    """Of both versions, and of those around a group; in a container its path may be the host's."""
    program = build(tmp_path)

    def granted(groups: str, files: dict[str, str]) -> int:
        """Of eight."""
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        (folder / "groups").write_text(groups)
        for name, text in files.items():
            file = folder / "root" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")
        ran = run(program, "granted", 8, folder / "groups", folder / "root")
        assert ran.returncode == 0, ran.stderr
        return int(ran.stdout)

    assert granted(SECOND, {}) == granted("", {}) == granted("0\nx:y\n", {}) == 8
    own = {"a/b/cpu.max": "500000 100000"}
    assert granted(SECOND, own) == 5
    assert granted(SECOND, own | {"a/cpu.max": "150000 50000"}) == 3
    assert granted(SECOND, own | {"cpu.max": "max 100000", "a/c/cpu.max": "1 1"}) == 5
    assert granted(SECOND, own | {"cpu.max": "1000 100000"}) == 1
    assert granted(SECOND, {"cpu.max": "900000 100000"}) == 8
    assert granted("0::/of/the/host\n", {"cpu.max": "300000 100000"}) == 3
    period = {"cpu/a/b/cpu.cfs_period_us": "100000"}
    assert granted(FIRST, period | {"cpu/a/b/cpu.cfs_quota_us": "400000"}) == 4
    assert granted(FIRST, period | {"cpu/a/b/cpu.cfs_quota_us": "-1"}) == 8
    top = {"cpu/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "200000"}
    assert granted(FIRST, top) == granted("2:cpu:/of/the/host\n", top) == 2
    assert granted("5:cpuset:/a/b\n", period | {"cpu/a/b/cpu.cfs_quota_us": "1"}) == 8


@pytest.mark.slow
def test_under_address_sanitizer(tmp_path):
    ran = run(build(tmp_path, "-fsanitize=address,undefined"), "fork")
    assert ran.returncode == 0, ran.stderr


@pytest.mark.slow
def test_under_thread_sanitizer(tmp_path):
    program = build(tmp_path, "-fsanitize=thread")
    ran = run(program, "stay")  # it does not follow a fork of several threads
    assert ran.returncode == 0, ran.stderr
    raced = run(program, "race")
    assert raced.returncode != 0 and "data race" in raced.stderr, "or it proves nothing"


def test_the_pool_has_the_cpus_of_this_process():
    if not hasattr(os, "sched_getaffinity"):
        pytest.skip("this system has no affinity")
    cpu = native.load("cpu")
    before = cpu.pool_threads()
    assert 1 <= before <= len(os.sched_getaffinity(0))
    cpu.resize_pool(0)
    assert cpu.pool_threads() == 1
    cpu.resize_pool(before)
    assert cpu.pool_threads() == before
