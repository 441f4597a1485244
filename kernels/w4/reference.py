"""The oracle: unpack to float32, multiply in float32 or wider."""

import torch
from torch.nn.functional import pad

from engine.kernels.w4.format import Packed, steps, unpack


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


def scale_gradients(dw: torch.Tensor, packed: Packed) -> dict[str, torch.Tensor]:
    """The gradient in W (N, K) -> those in its "scales" and "mins", (N, G) float32 or wider.

    Of a group's scale it is the sum of dL/dW times what the scale multiplies, of its minimum the
    sum of dL/dW (PEQA, Kim et al., 2305.14152).
    """
    n, k = packed.shape
    columns = dw if packed.perm is None else dw[:, packed.perm]
    grouped = pad(columns, (0, packed.groups * packed.group - k)).view(n, packed.groups, -1)
    wide = torch.promote_types(dw.dtype, torch.float32)
    gradients = {"scales": (steps(packed) * grouped).sum(-1, dtype=wide)}
    if packed.mins is not None:
        gradients["mins"] = grouped.sum(-1, dtype=wide)
    return gradients
