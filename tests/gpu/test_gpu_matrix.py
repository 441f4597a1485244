"""What a GPU kernel is given: a weight whose every tensor is what its shape says, on one device."""

from dataclasses import replace

import pytest
import torch
from support.packed import every_spec, random_packed, spec_id

from engine.kernels import native
from engine.kernels.w4.format import Spec
from engine.kernels.w4.layout_gpu import from_gpu, to_gpu

EVERY_PART = Spec(4, 32, "kquant")
SCHEMES = [Spec(4, 32, "zero"), Spec(4, 32, "minimum"), EVERY_PART, Spec(4, 64, "codebook")]
DAMAGES = {
    "rows": (lambda t: t[:-1], ValueError, "must be"),
    "columns": (lambda t: t[..., :-1].contiguous(), ValueError, "must be"),
    "dtype": (lambda t: t.to(torch.float64), TypeError, "must be .*, found torch.float64"),
    "device": (lambda t: t.to("meta"), ValueError, "is on meta, codes are on cpu"),
    "order": (lambda t: t.repeat_interleave(2, 0)[::2], ValueError, "must be contiguous"),
    "absence": (lambda t: None, ValueError, "its scheme stores"),
}


@pytest.mark.parametrize("spec", every_spec(), ids=spec_id)
def test_sound_ones_pass(rng, spec):
    packed = random_packed(rng, 33, 200, spec)
    assert from_gpu(to_gpu(packed)).shape == (33, 200)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("spec", SCHEMES, ids=spec_id)
def test_every_tensor_is_checked(rng, spec, damage):
    change, error, words = DAMAGES[damage]
    matrix = to_gpu(random_packed(rng, 33, 200, spec, permuted=True))
    for part, tensor in matrix.tensors().items():
        alone = damage in ("device", "absence") and part == "codes"  # what the others stand beside
        if (
            alone
            or (part, damage) == ("perm", "absence")
            or (damage == "columns" and tensor.ndim < 2)
        ):
            continue
        with pytest.raises(error, match=words):
            replace(matrix, **{part: change(tensor)})


@pytest.mark.parametrize(
    ("status", "driver", "words"),
    [
        (100, 13000, "the driver shows no GPU"),
        (0, 13000, "the driver shows no GPU"),
        (35, 0, "there is no NVIDIA driver"),
        (35, 11040, "is for CUDA 11.4, older than this build's 13.0: a newer driver is needed"),
        (999, 13000, "CUDA: unknown error"),
    ],
)
def test_why_there_is_no_gpu(status, driver, words):
    if reason := native.error("cuda"):
        pytest.skip(f"engine._cuda does not load: {reason}")
    assert words in native.load("cuda").explain(status, driver, 13000)
