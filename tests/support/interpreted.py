"""Runs tests of Triton kernels in a child process, where the kernels are interpreted on the CPU.

TRITON_INTERPRET must be set before a kernel is imported and would stop the ahead-of-time tests, so
interpreted tests live in files `interpreted_<topic>.py`, which pytest does not collect by itself.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_interpreted(
    topic: str, timeout_s: float = 600, marks: str = "not slow", names: str = ""
) -> None:
    """Fails with the child's report unless `interpreted_<topic>.py` passes: its `marks` alone, and
    of these what the expression `names` (pytest's -k) selects."""
    file = HERE / f"interpreted_{topic}.py"
    options = ["-q", "-p", "no:cacheprovider", "-m", marks, "-k", names]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
