"""Weights to codes: round to nearest, HQQ, GPTQ and NF4, each from one matrix to one `Packed`.

Each takes a weight (N, K) of any float dtype, a `Spec`, and the name that errors give the weight:
InputError where it is no matrix, holds NaN or Inf, or where the method lacks the scheme.
"""

from dataclasses import replace

import torch

from engine.errors import InputError
from engine.kernels.w4.format import NF4, Packed, Spec, pack_codes, validate
from engine.quantize.grid import (
    FITTED,
    UNIFORM,
    Grid,
    by_group,
    by_rows,
    checked,
    fit_grid,
    groups_of,
    nonzero,
    packed_grids,
    require_finite,
    require_scheme,
    stored,
)

_HQQ_STEPS = 20


def rtn(weight: torch.Tensor, spec: Spec, clip: str = "minmax", name: str = "weight") -> Packed:
    """Round to nearest, over each group's range or ("mse") the clipped range of least error."""
    require_scheme(spec, FITTED, name)
    return by_group(weight, spec, lambda values: fit_grid(values, spec, clip), name)


def hqq(weight: torch.Tensor, spec: Spec, name: str = "weight") -> Packed:
    """Half-quadratic quantization (Badri and Shaji, 2023): least |error|**0.7, no data needed.

    Alternates between the outliers E, a shrinkage of the error, and the offset that fits W - E, as
    the paper does, but from the clipped range. It is made for scheme "minimum": where no offset is
    free the scale is fitted, which gives up the largest weights and can cost more than rounding.
    """
    require_scheme(spec, UNIFORM, name)

    def fit(values: torch.Tensor) -> Grid:
        grid = best = fit_grid(values, spec, "mse")
        least = torch.full_like(grid.scale, torch.inf)
        for step in range(_HQQ_STEPS):
            codes = grid.encode(values)
            error = values - grid.decode(codes)
            size = error.abs()
            power = size.pow(0.7)
            found = power.sum(-1, keepdim=True)
            best = best.better(grid, found < least)
            least = torch.minimum(found, least)
            beta = 10 * 1.01**step
            outliers = (size - power / (beta * size.clamp_min(1e-8))).clamp_min_(0)
            grid = _refit(grid, codes, values - error.sign() * outliers)
        return best

    return by_group(weight, spec, fit, name)


def nf4(weight: torch.Tensor, spec: Spec, name: str = "weight") -> Packed:
    """NormalFloat (Dettmers et al., 2305.14314): the nearest quantile of each group's maximum."""
    require_scheme(spec, ("codebook",), name)
    table = torch.tensor(NF4, device=weight.device)
    middles = (table[1:] + table[:-1]) / 2

    def rows(part: torch.Tensor) -> Packed:
        pieces = groups_of(part, spec)
        scales = [stored(piece.abs().amax(-1, keepdim=True), spec) for piece in pieces]
        codes = [
            torch.bucketize(piece / nonzero(scale), middles).flatten(1)
            for piece, scale in zip(pieces, scales, strict=True)
        ]
        scale = torch.cat(scales, 1)[..., 0]
        require_finite(scale, spec, name)
        packed = pack_codes(torch.cat(codes, 1).to(torch.uint8), spec.bits)
        shape, scale = (part.shape[0], part.shape[1]), scale.to(spec.scale_dtype)
        return validate(Packed(spec, shape, packed, scale, codebook=table), name)

    return by_rows(weight, rows, name)


def gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    spec: Spec,
    *,
    act_order: bool = False,
    descending: bool = True,
    damp: float = 0.1,
    block: int = 128,
    clip: str = "minmax",
    name: str = "weight",
) -> Packed:
    """GPTQ (Frantar et al., 2210.17323): rounds column by column, each error spread over the rest.

    `hessian` (K, K) is the sum of x x' over the inputs. The columns go from the largest input to
    the smallest, so that what matters most is rounded while most can still make up for it; in their
    own order unless `descending`. Groups are the matrix's own, their grids fitted before; with
    `act_order` they follow that order, which the packed permutation records. Where groups come one
    after the other, a grid is fitted when it is its turn. `damp` is a share of the mean diagonal;
    `block` columns are rounded before the columns after them hear of it. InputError where the
    damped Hessian is not positive definite.
    """
    require_scheme(spec, FITTED, name)
    weight = checked(weight, name)
    k = weight.shape[1]
    if hessian.shape != (k, k) or not hessian.isfinite().all():
        raise InputError(f"{name}: the Hessian must be finite and {(k, k)}")
    width, late = spec.group or k, spec.group > 0 and (act_order or not descending)
    order = torch.arange(k, device=hessian.device)
    if descending:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order], damp, name).to(weight.dtype)
    # An error costs its square over this one's, once the columns after it have made up for it.
    cost = factor.diagonal().square().reciprocal()
    grids = []
    if not late:
        costs = cost[order.argsort()].split(width)
        pieces = zip(weight.split(width, 1), costs, strict=True)
        grids = [fit_grid(part[:, None], spec, clip, at[None]) for part, at in pieces]
    weight, group = weight[:, order], (order // width).tolist()
    if late:  # a group ends in the block it starts in, where every error is known
        block = width * max(1, block // width)
    codes = torch.empty_like(weight)
    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = torch.empty_like(weight[:, start:stop])
        for i in range(start, stop):
            if late and i % width == 0:
                columns = slice(i, i + width)
                grids.append(fit_grid(weight[:, None, columns], spec, clip, cost[None, columns]))
            grid = grids[-1] if late else grids[group[i]]
            column = weight[:, i, None, None]
            code = grid.encode(column)
            error = (column - grid.decode(code))[..., 0] / factor[i, i]
            weight[:, i:stop] -= error * factor[i, i:stop]
            codes[:, i], errors[:, i - start] = code[:, 0, 0], error[:, 0]
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    if act_order and late:
        return packed_grids(spec, codes, grids, order, name)
    return packed_grids(spec, codes[:, order.argsort()], grids, None, name)


def _refit(grid: Grid, codes: torch.Tensor, target: torch.Tensor) -> Grid:
    """The grid nearest to `target` under given codes: by its offset, or by its scale if it has
    none."""
    if grid.spec.scheme == "minimum":
        shift = (target - codes * grid.scale).mean(-1, keepdim=True)
        return replace(grid, shift=stored(shift, grid.spec))
    centred = codes - grid.shift
    squares = centred.square().sum(-1, keepdim=True)
    scale = (centred * target).sum(-1, keepdim=True) / nonzero(squares)
    return replace(grid, scale=stored(scale, grid.spec))


def _inverse_factor(hessian: torch.Tensor, damp: float, name: str) -> torch.Tensor:
    """(K, K) upper triangular U, U' U the inverse of the damped Hessian."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean if mean > 0 else 1  # inputs that were always zero
    diagonal += damp * mean
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed:
        raise InputError(f"{name}: the Hessian is not positive definite; calibrate on more text")
    return upper
