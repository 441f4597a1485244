"""Inputs for the tests of the angular distance kernels."""

import torch

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# (R boundaries, B samples, D features): around every tile, odd sizes, one sample, real widths
CASES = [(2, 1, 1), (3, 3, 5), (4, 2, 15), (5, 3, 16), (17, 1, 33), (31, 2, 576), (49, 2, 257)]
CASES += [(127, 1, 40)]


def boundaries(rng: torch.Generator, R: int, B: int, D: int, dtype: torch.dtype) -> torch.Tensor:
    """(R, B, D): a residual stream that its first layers hardly turn and its last turn much."""
    steps = torch.logspace(-4, 0, R)[:, None, None]
    start = torch.randn(1, B, D, generator=rng) + 3
    return (start + (torch.randn(R, B, D, generator=rng) * steps).cumsum(0)).to(dtype)
