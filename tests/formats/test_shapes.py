"""benchmarks/shapes.py: random weights in the shape of a model."""

import pytest
from shapes import blocks

from engine.export.gguf_file import Place


@pytest.mark.parametrize(("kind", "codes"), [("Q4_0", 2), ("Q4_K", 16)])
def test_all_codes_are_equally_frequent(kind, codes, rng):
    place = Place("w", kind, (256, 1024))
    data = blocks(place, rng).view(-1, place.tensor.type.nbytes)[:, codes:]
    for nibbles in (data & 15, data >> 4):
        found = nibbles.flatten().bincount(minlength=16) / data.numel()
        assert (found - 1 / 16).abs().max() < 4e-3  # six standard deviations
