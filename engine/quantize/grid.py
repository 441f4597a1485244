"""Grids of codes, the arithmetic that every quantizer shares.

A weight W is (N, K) of any float dtype. Groups of g lie along K; inside, a group is an axis:
(N, G, g). Scales are rounded to the stored dtype before codes are chosen, so that the codes
answer to what will be read.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from engine.errors import InputError
from engine.kernels.w4.format import IQ4_NL, Packed, Spec, concatenate, pack_codes, validate

UNIFORM = ("symmetric", "zero", "minimum")
FITTED = (*UNIFORM, "codebook")  # what `fit_grid` knows; the codebook is IQ4_NL's
_CHUNK_WEIGHTS = 1 << 23  # bounds the float32 temporaries
_SHARES = torch.linspace(0.98, 0.5, 25)  # of the range
_COARSE = torch.tensor([0.95, 0.85, 0.75])


@dataclass(frozen=True)
class Grid:
    """The values that codes 0 .. 2**bits - 1 stand for; scale and shift are (N, G, 1) float32.

    `shift` is the code of zero, or for scheme "minimum" the value of code 0; 0 for a codebook,
    whose scale may be negative: its values reach further on one side.
    """

    spec: Spec
    scale: torch.Tensor
    shift: torch.Tensor

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """(N, G, g) -> the nearest codes, as float32; of 8 symmetric bits none is -128."""
        if self.spec.scheme == "codebook":
            table = codebook(values.device)
            middles = (table[1:] + table[:-1]) / 2
            return torch.bucketize(values / nonzero(self.scale), middles).float()
        if self.spec.scheme == "minimum":
            codes = (values - self.shift) / nonzero(self.scale)
        else:
            codes = values / nonzero(self.scale) + self.shift
        # -128 is as far from the end of the range as -127, and what reads GGUFs may not know it.
        least = 1 if (self.spec.scheme, self.spec.bits) == ("symmetric", 8) else 0
        return codes.round_().clamp_(least, (1 << self.spec.bits) - 1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The format's formula."""
        if self.spec.scheme == "codebook":
            return codebook(codes.device)[codes.int()] * self.scale
        if self.spec.scheme == "minimum":
            return codes * self.scale + self.shift
        return (codes - self.shift) * self.scale

    def better(self, other: "Grid", chosen: torch.Tensor) -> "Grid":
        """The other grid where `chosen` (N, G, 1), else this one."""
        return replace(
            self,
            scale=torch.where(chosen, other.scale, self.scale),
            shift=torch.where(chosen, other.shift, self.shift),
        )


def codebook(device: torch.device) -> torch.Tensor:
    """(16,) float32"""
    return torch.tensor(IQ4_NL, dtype=torch.float32, device=device)


def make_grid(spec: Spec, low: torch.Tensor, high: torch.Tensor) -> Grid:
    """A grid from `low` to `high` (N, G, 1), as far as the scheme can follow them."""
    top = (1 << spec.bits) - 1
    if spec.scheme == "codebook":
        scale = stored(torch.where(-low > high, low, high) / IQ4_NL[0], spec)
        return Grid(spec, scale, torch.zeros_like(scale))
    if spec.scheme == "symmetric":
        scale = stored(torch.maximum(low.abs(), high.abs()) / (top / 2), spec)
        return Grid(spec, scale, torch.full_like(scale, (top + 1) / 2))
    if spec.scheme == "minimum":
        return Grid(spec, stored((high - low) / top, spec), stored(low, spec))
    low, high = low.clamp(max=0), high.clamp(min=0)  # zero must be a value of the grid
    scale = stored((high - low) / top, spec)
    zero = (-low / nonzero(scale)).round_().clamp_(0, top)
    return Grid(spec, scale, zero)


def fit_grid(
    values: torch.Tensor, spec: Spec, clip: str = "minmax", cost: torch.Tensor | None = None
) -> Grid:
    """(N, G, g) -> the grid over the range, or ("mse") over the part of it with the least error.

    With `cost` (G, g), what a squared error costs at each place, it is the sum of these costs that
    is least; a coarser search, then least squares under the codes that it ends with.
    """
    if clip not in ("minmax", "mse"):
        raise InputError(f"clip must be 'minmax' or 'mse', found {clip!r}")
    low, high = values.aminmax(dim=-1, keepdim=True)
    best = make_grid(spec, low, high)
    if clip == "minmax":
        return best
    centre = (low + high) / 2 if spec.scheme == "minimum" else torch.zeros_like(low)
    least = _squared_error(values, best, cost)

    def take(grid: Grid) -> None:
        nonlocal best, least
        error = _squared_error(values, grid, cost)
        best = best.better(grid, error < least)
        least = torch.minimum(error, least)

    for share in (_SHARES if cost is None else _COARSE).tolist():
        grid = make_grid(spec, *(centre + share * (end - centre) for end in (low, high)))
        take(grid)
        if spec.scheme == "codebook":  # the longer side of the table to the shorter of the values
            take(replace(grid, scale=-grid.scale))
    if cost is not None:  # with an offset to fit, each fit moves codes that the next one profits by
        for _ in range(4 if spec.scheme == "minimum" else 1):
            take(_least_squares(best, values, cost))
    return best


def _least_squares(grid: Grid, values: torch.Tensor, cost: torch.Tensor) -> Grid:
    """The scale, and the minimum, of least cost under the codes that `grid` gives."""
    steps = grid.decode(grid.encode(values))
    if grid.spec.scheme == "minimum":
        steps = (steps - grid.shift) / nonzero(grid.scale)
        total = cost.sum(-1, keepdim=True)
        mean, middle = ((cost * part).sum(-1, keepdim=True) / total for part in (steps, values))
        steps, values = steps - mean, values - middle
    else:
        steps = steps / nonzero(grid.scale)
        mean = middle = torch.zeros_like(grid.scale)
    weighted = cost * steps
    scale = (weighted * values).sum(-1, keepdim=True)
    scale = stored(scale / nonzero((weighted * steps).sum(-1, keepdim=True)), grid.spec)
    if grid.spec.scheme == "minimum":
        return replace(grid, scale=scale, shift=stored(middle - mean * scale, grid.spec))
    return replace(grid, scale=scale)


def _squared_error(values: torch.Tensor, grid: Grid, cost: torch.Tensor | None) -> torch.Tensor:
    """(N, G, 1)"""
    squares = (values - grid.decode(grid.encode(values))).square_()
    return (squares if cost is None else squares.mul_(cost)).sum(-1, keepdim=True)


def by_group(
    weight: torch.Tensor, spec: Spec, fit: Callable[[torch.Tensor], Grid], name: str
) -> Packed:
    """Each group rounded to the nearest code of the grid that `fit` gives it."""

    def rows(part: torch.Tensor) -> Packed:
        pieces = groups_of(part, spec)
        grids = [fit(piece) for piece in pieces]
        codes = [grid.encode(piece).flatten(1) for grid, piece in zip(grids, pieces, strict=True)]
        return packed_grids(spec, torch.cat(codes, 1), grids, None, name)

    return by_rows(weight, rows, name)


def by_rows(weight: torch.Tensor, quantize: Callable[[torch.Tensor], Packed], name: str) -> Packed:
    """A matrix quantized a few rows at a time, on bounded memory."""
    weight = checked(weight, name)
    rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
    return concatenate([quantize(part) for part in weight.split(rows)])


def packed_grids(
    spec: Spec, codes: torch.Tensor, grids: list[Grid], perm: torch.Tensor | None, name: str
) -> Packed:
    """(N, K) codes and the grids of their groups, in order."""
    scales, shift = (
        torch.cat([getattr(grid, part) for grid in grids], 1)[..., 0] for part in ("scale", "shift")
    )
    require_finite(scales, spec, name)
    require_finite(shift, spec, name)
    packed = Packed(
        spec,
        (codes.shape[0], codes.shape[1]),
        pack_codes(codes.to(torch.uint8), spec.bits),
        scales.to(spec.scale_dtype),
        zeros=shift.to(torch.uint8) if spec.scheme == "zero" else None,
        mins=shift.to(spec.scale_dtype) if spec.scheme == "minimum" else None,
        codebook=codebook(codes.device) if spec.scheme == "codebook" else None,
        perm=None if perm is None else perm.int(),
    )
    return validate(packed, name)


def require_finite(stored_scales: torch.Tensor, spec: Spec, name: str) -> None:
    """InputError where a scale passed the largest number of its dtype."""
    if not stored_scales.isfinite().all():
        raise InputError(f"{name}: its values are too large for {spec.scale_dtype} scales")


def groups_of(values: torch.Tensor, spec: Spec) -> list[torch.Tensor]:
    """(N, K) -> the whole groups (N, K // g, g), and the short last one (N, 1, K % g)."""
    width = spec.group or values.shape[1]
    whole = values.shape[1] // width * width
    pieces = (values[:, :whole].unflatten(1, (-1, width)), values[:, None, whole:])
    return [piece for piece in pieces if piece.numel()]


def stored(values: torch.Tensor, spec: Spec) -> torch.Tensor:
    """What float32 values are once read back from the scale dtype."""
    return values.to(spec.scale_dtype).float()


def nonzero(scale: torch.Tensor) -> torch.Tensor:
    """To divide by: every code of a group with scale 0 stands for one value."""
    return torch.where(scale == 0, 1, scale)


def require_scheme(spec: Spec, schemes: tuple[str, ...], name: str) -> None:
    if spec.scheme not in schemes:
        raise InputError(f"{name}: scheme must be one of {schemes}, found {spec.scheme!r}")


def checked(weight: torch.Tensor, name: str) -> torch.Tensor:
    """(N, K) float32; InputError where it is no matrix or holds NaN or Inf."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"{name}: expected a floating-point matrix, found {tuple(weight.shape)} {weight.dtype}"
        )
    if not weight.isfinite().all():
        raise InputError(f"{name}: holds NaN or Inf")
    return weight.float()
