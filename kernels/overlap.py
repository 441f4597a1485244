"""Programmatic dependent launch: a kernel that starts while the one before it still runs."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LEAST_CAPABILITY = (9, 0)


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Of a kernel launched with `launch_pdl`: lets the next one start, then waits until the one
    before has ended. It comes first, so that nothing is touched that a kernel may write."""
    if OVERLAP:  # the interpreter has neither
        gdc_launch_dependents()
        gdc_wait()


def options(overlap: bool) -> dict[str, bool]:
    """Of the launch of a kernel whose parameter OVERLAP goes to `wait_for_previous`."""
    return {"OVERLAP": True, "launch_pdl": True} if overlap else {}


def can(device: torch.device) -> bool:
    """Whether kernels overlap there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY
