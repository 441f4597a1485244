"""The oracle: unpack to float32, multiply in float32 or wider."""

import torch

from engine.kernels.w4.format import Packed, unpack


def matmul(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) of a float dtype, bias (N,) -> x @ unpack(packed).T + bias, (..., N) as x.

    Computed in float64 for float64 x, in float32 otherwise. Raises ValueError or TypeError.
    """
    n, k = packed.shape
    if not x.is_floating_point():
        raise TypeError(f"x must be floating point, found {x.dtype}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}), found {tuple(x.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be ({n},), found {tuple(bias.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ unpack(packed).to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype)


def matmul_transposed(y: torch.Tensor, packed: Packed) -> torch.Tensor:
    """y (..., N) of a float dtype -> y @ unpack(packed), (..., K) as y: the gradient in x.

    Computed as `matmul` is. Raises ValueError or TypeError.
    """
    n = packed.shape[0]
    if not y.is_floating_point():
        raise TypeError(f"y must be floating point, found {y.dtype}")
    if y.dim() == 0 or y.shape[-1] != n:
        raise ValueError(f"y must be (..., {n}), found {tuple(y.shape)}")
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) @ unpack(packed).to(wide)).to(y.dtype)
