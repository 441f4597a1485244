"""The native thread pool (csrc/cpu/threads.h), plain and under sanitizers."""

import os
import shutil
import subprocess
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


def run(program: Path, mode: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, mode], capture_output=True, text=True, timeout=300)


def test_regions_barriers_and_loops(tmp_path):
    ran = run(build(tmp_path), "fork")
    assert ran.returncode == 0, ran.stderr


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
