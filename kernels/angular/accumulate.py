"""Angular distances between all boundaries of a model, accumulated over calls and processes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Self

import torch
from torch import Tensor

from engine.kernels.angular.reference import Sums
from engine.kernels.dispatch import ANGULAR, TRITON_BOUNDARIES, choose, require
from engine.kernels.dtypes import DTYPES, name_of

MODULES = {"reference": "reference", "cpu": "cpu", "triton": "fused"}  # backend -> module
VECTORS = (*DTYPES, "float64")  # dtypes of boundaries
SUMS = ("distance", "distance_square", "cosine", "magnitude")


@dataclass(frozen=True)
class AngularResult:
    """Means over the samples, float64; a triangle is indexed [count - 1][start].

    `triangle[count - 1][start]` compares boundary `start` with boundary `start + count`.
    """

    distances: tuple[Tensor, ...]  # arccos(cosine) / pi, in [0, 1]
    standard_errors: tuple[Tensor, ...]  # of the distances; NaN below two samples
    influence: Tensor  # (L,) 1 - mean cosine between a layer's input and output
    magnitude: Tensor  # (L,) mean of |output - input| / |output|
    samples: int  # of weight above 0
    weight: float  # sum of the weights


@dataclass(frozen=True)
class Totals:
    """Exact to add: sums over samples and nothing else."""

    boundaries: int
    samples: int
    weight: float
    weight_square: float
    sums: Tensor  # (4, P) float64 in the order of SUMS

    def __add__(self, other: "Totals") -> "Totals":
        if self.boundaries != other.boundaries:
            raise ValueError(
                f"cannot add distances of {self.boundaries} and of {other.boundaries} boundaries"
            )
        mine = {field.name: getattr(self, field.name) for field in fields(self)}
        added = {name: value + getattr(other, name) for name, value in mine.items()}
        return Totals(**added | {"boundaries": self.boundaries})


class AngularAccumulator:
    """Accumulates the distances of every pair of boundaries; each sample is read once.

    `backend` is "reference", "cpu" or "triton"; None takes triton for tensors on a GPU (up to 128
    boundaries), cpu for others, and reference where that cannot run. `self.backend` tells which.
    """

    def __init__(self, backend: str | None = None) -> None:
        if backend is not None and backend not in MODULES:
            raise ValueError(f'backend "{backend}" is none of {", ".join(MODULES)}')
        self.backend = backend
        self._totals: Totals | None = None

    def update(
        self,
        boundaries: Tensor | Sequence[Tensor],
        weights: Tensor | None = None,
        values: bool = False,
    ) -> Tensor | None:
        """Adds B samples: boundaries (L + 1, B, D), or L + 1 tensors (B, D), of any float dtype.

        weights: (B,), at least 0; a sample of weight 0 is not read. With `values`, returns the
        distances (B, P) float64 of the P pairs i < j, the row-major upper triangle. A vector
        that has no direction (zero, NaN, infinity) is a ValueError that names its boundary and
        sample, and nothing is added.
        """
        rows = _check_boundaries(boundaries)
        if weights is not None:
            weights = _check_weights(weights, rows[0])
        found = self._backend(rows)(rows, weights, values)
        _check_directions(found, weights)
        used = torch.ones(len(rows[0]), device="cpu") if weights is None else weights
        self._add(
            Totals(
                boundaries=len(rows),
                samples=int((used > 0).sum()),
                weight=float(used.sum()),
                weight_square=float(used.square().sum()),
                sums=found.sums.cpu(),
            )
        )
        return found.values

    def merge(self, other: Self) -> None:
        """Adds what another accumulator holds."""
        if other._totals is not None:
            self._add(other._totals)

    def result(self) -> AngularResult:
        """The means so far; ValueError when no sample was added."""
        t = self._totals
        if t is None or not t.samples:
            raise ValueError("no samples were added, so there are no mean distances")
        distance, square, cosine, magnitude = t.sums / t.weight
        effective = t.weight**2 / t.weight_square  # equals the samples when weights are equal
        variance = (square - distance.square()).clamp_min(0)
        error = (variance / (effective - 1)).sqrt() if effective > 1 else variance * torch.nan
        return AngularResult(
            distances=triangle(distance, t.boundaries),
            standard_errors=triangle(error, t.boundaries),
            influence=1 - triangle(cosine, t.boundaries)[0],
            magnitude=triangle(magnitude, t.boundaries)[0],
            samples=t.samples,
            weight=t.weight,
        )

    def to_state(self) -> dict[str, Any]:
        """Everything accumulated, as JSON types that round-trip exactly."""
        t = self._totals
        if t is None:
            return {}
        sums = dict(zip(SUMS, t.sums.tolist(), strict=True))
        names = ("boundaries", "samples", "weight", "weight_square")
        return {name: getattr(t, name) for name in names} | {"sums": sums}

    @classmethod
    def from_state(cls, state: dict[str, Any], backend: str | None = None) -> Self:
        """The accumulator that `to_state` described; ValueError when `state` is no such thing."""
        accumulator = cls(backend)
        if state:
            accumulator._totals = _read_totals(state)
        return accumulator

    def _add(self, totals: Totals) -> None:
        self._totals = totals if self._totals is None else self._totals + totals

    def _backend(self, rows: Sequence[Tensor]):
        if self.backend is None:
            self.backend = choose(ANGULAR, "cuda" if rows[0].device.type == "cuda" else "cpu")
            if self.backend == "triton" and len(rows) > TRITON_BOUNDARIES:
                self.backend = "reference"
        require(self.backend)
        return import_module(f"engine.kernels.angular.{MODULES[self.backend]}").angular_sums


def triangle(pairs: Tensor, boundaries: int) -> tuple[Tensor, ...]:
    """Pairs (..., P) as rows by block size: [count - 1][..., start]."""
    i, j = torch.triu_indices(boundaries, boundaries, 1, device=pairs.device)
    by_count = pairs[..., (j - i).argsort(stable=True)]
    return by_count.split(list(range(boundaries - 1, 0, -1)), dim=-1)


def _check_boundaries(boundaries: Tensor | Sequence[Tensor]) -> list[Tensor]:
    rows = list(boundaries)
    if len(rows) < 2 or any(row.ndim != 2 for row in rows):
        shapes = [tuple(row.shape) for row in rows]
        raise ValueError(f"expected 2 or more boundaries of shape (B, D), found {shapes}")
    first = rows[0]
    for index, row in enumerate(rows):
        if (row.shape, row.dtype, row.device) != (first.shape, first.dtype, first.device):
            raise ValueError(
                f"boundary {index} is {tuple(row.shape)} {row.dtype} on {row.device}, "
                f"boundary 0 is {tuple(first.shape)} {first.dtype} on {first.device}"
            )
    if name_of(first.dtype) not in VECTORS:
        raise TypeError(f"expected a float dtype of 16 to 64 bits, found {first.dtype}")
    return rows


def _check_weights(weights: Tensor, row: Tensor) -> Tensor:
    if weights.shape != row.shape[:1]:
        raise ValueError(f"expected {len(row)} weights, found shape {tuple(weights.shape)}")
    weights = weights.to(row.device, torch.float64)
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError("expected finite weights of at least 0")
    return weights


def _check_directions(found: Sums, weights: Tensor | None) -> None:
    bad = ~((found.squares > 0) & found.squares.isfinite())
    if weights is not None:
        bad &= weights > 0
    if bool(bad.any()):
        sample, boundary = (int(index) for index in bad.T.nonzero()[0])
        square = float(found.squares[boundary, sample])
        what = "zero" if square == 0 else "not finite (a NaN, an infinity or an overflow)"
        raise ValueError(f"boundary {boundary}, sample {sample}: the vector's norm is {what}")


def _read_totals(state: dict[str, Any]) -> Totals:
    try:
        R, samples = int(state["boundaries"]), int(state["samples"])
        sums = torch.tensor([state["sums"][name] for name in SUMS], dtype=torch.float64)
        totals = Totals(R, samples, float(state["weight"]), float(state["weight_square"]), sums)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not the state of an AngularAccumulator: {error!r}") from error
    if R < 2 or sums.shape != (4, R * (R - 1) // 2) or not bool(sums.isfinite().all()):
        raise ValueError(f"the state's sums do not fit its {R} boundaries")
    return totals
