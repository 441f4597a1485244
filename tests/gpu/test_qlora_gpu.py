"""QLoRA on a GPU: the Trainer's loop over W4Linear's Triton kernels, against peft in float32."""

from dataclasses import replace

import pytest
import torch
from support.healing import draw, shortened
from support.qlora import SETTINGS, pack_base, peers_losses

from engine.healing.qlora import qlora
from engine.kernels import dispatch

pytestmark = pytest.mark.gpu


def test_twenty_steps(source, rng, tmp_path):
    """In bfloat16, without dropout: a GPU draws other masks than a CPU."""
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: {dispatch.why_not('triton')}")
    pytest.importorskip("peft")
    checkpoint = source("llama")
    data = draw(checkpoint, rng)
    pack_base(checkpoint, shortened(checkpoint), tmp_path / "base")
    settings = replace(SETTINGS, precision="bfloat16", dropout=0.0)
    standing, _ = qlora(tmp_path / "base", data, settings, tmp_path, "cuda", backend="triton")
    expected = peers_losses(tmp_path / "base", data, settings, tmp_path)
    assert standing.losses == pytest.approx(expected, rel=1e-2)
