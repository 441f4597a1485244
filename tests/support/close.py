"""Comparison with a reference by RMS ratio, the bound every numerical test states."""

import torch


def rms_ratio(reference: torch.Tensor, got: torch.Tensor) -> float:
    """RMS(got - reference) / RMS(reference), in float64; NaN when either holds a NaN."""
    reference, got = reference.detach().double().cpu(), got.detach().double().cpu()
    scale = reference.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((got - reference).square().mean().sqrt() / scale)


def assert_close(name: str, reference: torch.Tensor, got: torch.Tensor, ratio: float) -> None:
    """Fails unless the shapes agree and the RMS ratio is a number no larger than `ratio`."""
    assert got.shape == reference.shape, f"{name}: shape {got.shape}, expected {reference.shape}"
    found = rms_ratio(reference, got)
    assert found <= ratio, f"{name}: RMS ratio {found:.3g}, bound {ratio:.3g}"
