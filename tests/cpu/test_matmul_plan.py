"""The matmul planner (csrc/cpu/plan.h) and how a tile is walked, whatever this processor runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLAN = ("tests/support/matmul_plan_check.cpp", "csrc/cpu/plan.cpp")
PARTS = ("features", "memory", "plan", "threads", "w4_layout")
STREAM = ("tests/support/stream_check.cpp", *(f"csrc/cpu/{name}.cpp" for name in PARTS))


def check(folder: Path, *sources: str) -> None:
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    program = folder / "check"
    command = ["c++", "-std=c++17", "-O1", "-pthread", "-Icsrc", *sources, "-o", program]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_paths_forms_and_claims(tmp_path):
    check(tmp_path, *PLAN)


def test_a_tile_from_every_block_on(tmp_path):
    """Where AMX's slices begin: also within the first group of a run."""
    check(tmp_path, *STREAM)
