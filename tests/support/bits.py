"""Bit patterns: drawing them, reading a field of one, and equality down to the last bit."""

import torch


def assert_same_bits(expected: torch.Tensor, got: torch.Tensor) -> None:
    assert expected.dtype == got.dtype == torch.float32 and expected.shape == got.shape
    assert torch.equal(expected.view(torch.int32), got.view(torch.int32))


def words(rng: torch.Generator, *shape: int) -> torch.Tensor:
    """int32 of any bit pattern."""
    return torch.randint(-(1 << 31), 1 << 31, shape, generator=rng).int()


def some_scales(rng: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=rng) / 16


def field(word: torch.Tensor, index: int, bits: int) -> int:
    return (int(word) & 0xFFFFFFFF) >> (bits * index) & ((1 << bits) - 1)
