"""Angular distances in float64 torch, pair by pair in the difference form: the oracle."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_BYTES = 64 * 2**20


class Sums(NamedTuple):
    """What every backend returns for R boundaries of B samples, P = R (R - 1) / 2 pairs.

    Pairs (i, j), i < j, are the row-major upper triangle. Everything is float64.
    """

    sums: Tensor  # (4, P) weighted sums of: distance, its square, cosine, relative magnitude
    squares: Tensor  # (R, B) squared norms; 1 where the weight is 0
    values: Tensor | None  # (B, P) distances where asked for; 0 where the weight is 0


def angular_sums(
    boundaries: Sequence[Tensor], weights: Tensor | None = None, values: bool = False
) -> Sums:
    """Sums over B samples of R tensors (B, D), weighted by `weights` (B,) float64."""
    R, (B, D), device = len(boundaries), boundaries[0].shape, boundaries[0].device
    P, float64 = R * (R - 1) // 2, dict[str, Any](dtype=torch.float64, device=device)
    weights = torch.ones(B, **float64) if weights is None else weights
    sums, squares = torch.zeros(4, P, **float64), torch.ones(R, B, **float64)
    distances = torch.zeros(B, P, **float64) if values else None
    kept = weights.nonzero().flatten()
    for chunk in kept.split(max(1, CHUNK_BYTES // (8 * R * max(D, 1)))):
        x = torch.stack([boundary[chunk] for boundary in boundaries]).double()
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        found = _pairs(x, norms)  # (4, chunk, P)
        sums += torch.einsum("b,qbp->qp", weights[chunk], found)
        squares[:, chunk] = norms.squeeze(-1).square()
        if distances is not None:
            distances[chunk] = found[0]
    return Sums(sums, squares, distances)


def _pairs(x: Tensor, norms: Tensor) -> Tensor:
    """Distance, its square, cosine and relative magnitude (4, B, P) of x (R, B, D)."""
    unit = x / norms
    rows = []
    for i in range(len(x) - 1):
        u, v = unit[i], unit[i + 1 :]
        apart = torch.linalg.vector_norm(v - u, dim=-1)
        together = torch.linalg.vector_norm(v + u, dim=-1)
        angle = 2 * torch.atan2(apart, together)
        change = torch.linalg.vector_norm(x[i + 1 :] - x[i], dim=-1) / norms[i + 1 :, :, 0]
        distance = angle / torch.pi
        rows.append(torch.stack([distance, distance.square(), angle.cos(), change]))
    return torch.cat(rows, dim=1).transpose(1, 2)
