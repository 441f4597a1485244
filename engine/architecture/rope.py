"""Rotary frequencies for every scaling that the families use, in float32 as in transformers, on the
CPU whatever torch's default device is."""

import math

import torch

from engine.architecture.config import Rope


def rotary(rope: Rope, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (B, T, dim) float32, for positions (B, T).

    The length that "dynamic" and "longrope" depend on is the largest position of the call plus
    one, over the whole batch: transformers' rule, kept so that logits agree with its.
    """
    frequencies = inverse_frequencies(rope, int(positions.max()) + 1).to(positions.device)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(rope: Rope, length: int) -> torch.Tensor:
    """(dim / 2,) float32: radians a position, for a sequence of `length` tokens."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device="cpu") / rope.dim
    if rope.kind == "dynamic":
        stretch = rope.factor * max(length, rope.original_context) / rope.original_context
        theta = rope.theta * (stretch - (rope.factor - 1)) ** (rope.dim / (rope.dim - 2))
        return 1.0 / theta**exponents
    if rope.kind in ("longrope", "divisors"):
        long = rope.kind == "longrope" and length > rope.original_context
        given = rope.long_divisors if long else rope.divisors
        divisors = torch.tensor(given, dtype=torch.float32, device="cpu")
        return 1.0 / (divisors * rope.theta**exponents)
    base = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _by_wavelength(rope, base)
    if rope.kind == "yarn":
        kept = 1 - _yarn_ramp(rope)
        return base / rope.factor * (1 - kept) + base * kept
    return base


def _by_wavelength(rope: Rope, base: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, the band between blended."""
    turns = rope.original_context * base / (2 * math.pi)  # rotations within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn_ramp(rope: Rope) -> torch.Tensor:
    """(dim / 2,): 0 where a frequency is kept, 1 where it is interpolated."""

    def dimension(rotations: float) -> float:
        wavelength = rope.original_context / (rotations * 2 * math.pi)
        return rope.dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    steps = torch.arange(rope.dim // 2, dtype=torch.float32, device="cpu")
    return ((steps - low) / (high - low)).clamp(0, 1)
