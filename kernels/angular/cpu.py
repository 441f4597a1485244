"""Launches the C++ kernel of csrc/cpu/angular.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.kernels import native
from engine.kernels.angular.reference import Sums
from engine.kernels.dtypes import name_of


def angular_sums(
    boundaries: Sequence[Tensor],
    weights: Tensor | None = None,
    values: bool = False,
    *,
    isa: str = "",
) -> Sums:
    """As in reference.py, on torch.get_num_threads() threads.

    `isa` forces "generic", "avx2", "avx512" or "amx"; ValueError where the processor lacks it.
    """
    rows = [row if row.stride(-1) == 1 else row.contiguous() for row in boundaries]
    R, (B, D) = len(rows), rows[0].shape
    P = R * (R - 1) // 2
    sums = torch.empty(4, P, dtype=torch.float64)
    squares = torch.empty(R, B, dtype=torch.float64)
    distances = torch.empty(B, P, dtype=torch.float64) if values else None
    weights = None if weights is None else weights.contiguous()
    native.load("cpu").angular(
        rows=[native.span(row) for row in rows],
        strides=[row.stride(0) for row in rows],
        dtype=name_of(rows[0].dtype),
        B=B,
        D=D,
        weights=native.span(weights),
        sums=native.span(sums),
        squares=native.span(squares),
        values=native.span(distances),
        threads=torch.get_num_threads(),
        isa=isa,
    )
    return Sums(sums, squares, distances)
