"""Packed matrices whose scales and minimums learn, their codes left as they are."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from engine.kernels.w4.format import Packed, spread, take, unpack
from engine.kernels.w4.ops import Prepared, autocast, matmul


class LearningLinear(nn.Module):
    """x (..., K) -> x @ W.T + bias, (..., N) as x, with gradients in W's scales and minimums.

    `scale` and `minimum` (N, G) float32 are what was learnt, 0 at first, in parts of the scale s
    that was given, so that one learning rate suits every group: s (1 + scale), m + s minimum. Of
    "kquant" these are the super-scales (N, ceil(K / 256)). W is computed as it will be stored, in
    the dtype of its spec; the gradient passes that rounding by.
    """

    minimum: nn.Parameter | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        super().__init__()
        self.given, self.shape = packed.to(packed.device), packed.shape  # tiles restored
        self.out_features, self.in_features = packed.shape
        scales, mins = _reals(packed)
        self.scale = nn.Parameter(torch.zeros_like(scales, dtype=torch.float32))
        self.minimum = None if mins is None else nn.Parameter(torch.zeros_like(self.scale))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def changes(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        found = {"scale": self.scale, "minimum": self.minimum}
        return {name: change for name, change in found.items() if change is not None}

    @property
    def packed(self) -> Packed:
        """With what was learnt, in the spec and the bytes of what was given; GGUF's types that lay
        in six bits have the eight of their spec."""
        given, dtype = self._given(), self.given.spec.scale_dtype
        learnt, offsets = self._learnt(given)
        scales = learnt.detach().to(dtype)
        mins = None if offsets is None else offsets.detach().to(dtype)
        if given.supers is not None and mins is not None:
            return replace(given, supers=torch.stack((scales, mins), dim=-1))
        return replace(given, scales=scales, mins=mins)

    def forward(self, x: Tensor) -> Tensor:
        x = autocast(x)
        wide = self._wide()
        matrix = Prepared(wide.spec, wide.shape, "dense", wide.tensors())
        return matmul(x, matrix, None if self.bias is None else self.bias.to(x.dtype))

    def rows(self, ids: Tensor) -> Tensor:
        """ids (...) int64 -> rows of W (..., K) float32: an embedding."""
        wide, chosen = self._wide(), ids.flatten()
        if chosen.numel() and (least := int(chosen.min())) < 0:
            raise IndexError(f"ids must be from 0 to {wide.shape[0] - 1}, found {least}")
        rows = take(wide.tensors(), chosen)
        part = Packed(wide.spec, (len(chosen), wide.shape[1]), **rows)
        return unpack(part).view(*ids.shape, -1)

    def _given(self) -> Packed:
        """On the device of the parameters, wherever the module was moved."""
        if self.given.device != self.scale.device:
            self.given = self.given.to(self.scale.device)
        return self.given

    def _learnt(self, given: Packed) -> tuple[Tensor, Tensor | None]:
        """Scales and minimums float32, rounded to what is stored."""
        scales, mins = _reals(given)
        dtype, unit = given.spec.scale_dtype, scales.float()
        learnt = _rounded(unit * (1 + self.scale), dtype)
        if mins is None or self.minimum is None:
            return learnt, None
        return learnt, _rounded(mins.float() + unit * self.minimum, dtype)

    def _wide(self) -> Packed:
        """W with a float32 scale, and minimum, for each group."""
        given = self._given()
        scales, mins = self._learnt(given)
        scheme = given.spec.scheme
        if mins is not None and given.mins is not None and scheme == "kquant":
            scales = spread(scales, given) * given.scales
            mins = -spread(mins, given) * given.mins
            scheme = "minimum"
        spec = replace(given.spec, scheme=scheme, scale_dtype=torch.float32)
        return replace(given, spec=spec, scales=scales, mins=mins, supers=None)


class LearningEmbedding(nn.Module):
    """ids (...) -> `factor` times rows of a matrix that a tied head may share, in `dtype`."""

    def __init__(
        self, matrix: LearningLinear, factor: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.matrix, self.factor, self.dtype = matrix, factor, dtype

    def forward(self, ids: Tensor) -> Tensor:
        return (self.factor * self.matrix.rows(ids)).to(self.dtype)


def _reals(packed: Packed) -> tuple[Tensor, Tensor | None]:
    """The scales and minimums that are real numbers: those of "kquant" stand in its supers."""
    if packed.supers is None:
        return packed.scales, packed.mins
    return packed.supers[..., 0], packed.supers[..., 1]


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest of `dtype`, as float32, with the gradient of `values` itself."""
    fixed = values.detach()
    return values + (fixed.to(dtype).float() - fixed)  # the difference is exact, so the sum is
