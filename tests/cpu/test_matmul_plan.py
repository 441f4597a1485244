"""The matmul planner (csrc/cpu/plan.h): paths, forms and claims, whatever this processor runs."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("tests/support/matmul_plan_check.cpp", "csrc/cpu/plan.cpp")


def test_paths_forms_and_claims(tmp_path):
    if not shutil.which("c++"):
        pytest.skip("no C++ compiler")
    program = tmp_path / "check"
    command = ["c++", "-std=c++17", "-O1", "-pthread", "-Icsrc", *SOURCES, "-o", program]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
