"""The GPU runtime against the reference, its kernels interpreted on a CPU."""

import pytest
from support.interpreted import run_interpreted


def test_interpreted():
    run_interpreted("runtime")


@pytest.mark.slow
def test_interpreted_at_length():
    run_interpreted("runtime", timeout_s=3600, marks="slow")
