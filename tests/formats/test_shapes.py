"""benchmarks/shapes.py: random weights in the shape of a model."""

import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from shapes import blocks

from engine.export.gguf_file import Place


@pytest.mark.parametrize(("kind", "codes"), [("Q4_0", 2), ("Q4_K", 16)])
def test_all_codes_are_equally_frequent(kind, codes, rng):
    place = Place("w", kind, (256, 1024))
    data = blocks(place, rng).view(-1, place.tensor.type.nbytes)[:, codes:]
    for nibbles in (data & 15, data >> 4):
        found = nibbles.flatten().bincount(minlength=16) / data.numel()
        assert (found - 1 / 16).abs().max() < 4e-3  # six standard deviations


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K"])
def test_weights_have_no_mean(kind, rng):
    """It would grow from layer to layer until every token has the same logits."""
    place = Place("w", kind, (256, 1024))
    data = blocks(place, rng).view(256, -1).numpy()
    values = dequantize(data, GGMLQuantizationType[kind])
    assert abs(values.mean()) < 0.03 * values.std()
    assert values.std() * 1024**0.5 == pytest.approx(1.04, rel=0.1)
