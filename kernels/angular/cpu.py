"""Launches the C++ kernel of csrc/cpu/angular.cpp."""

from collections.abc import Sequence
from functools import partial

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

    `isa` forces an instruction set by a name of csrc/cpu/isa.h (of those without a kernel of their
    own the nearest runs); ValueError where the processor lacks it.
    """
    rows = [row if row.stride(-1) == 1 else row.contiguous() for row in boundaries]
    R, (B, D) = len(rows), rows[0].shape
    P = R * (R - 1) // 2
    new = partial(torch.empty, dtype=torch.float64, device="cpu")  # whatever torch's default is
    sums, squares = new(4, P), new(R, B)
    distances = new(B, P) if values else None
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
