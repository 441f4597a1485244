"""The 4-bit ops on Triton: interpreted on a CPU (see interpreted.py), and, called by
test_w4_ops_gpu.py, on a GPU."""

import dataclasses

import pytest
import torch
from support.close import assert_close
from support.ops_checks import BOUND, SPECS, case, check_gradients, check_ops
from support.packed import random_packed, spec_id

from engine.kernels.w4 import launch
from engine.kernels.w4.format import Spec
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.ops import prepare, restore

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float16, torch.bfloat16)
every_spec_kind = pytest.mark.parametrize("spec", SPECS, ids=spec_id)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@every_dtype
@pytest.mark.parametrize("spec", SPECS[:1], ids=spec_id)
def test_opcheck(rng, spec, dtype):
    check_ops(rng, prepare(case(rng, spec, 18, 70).to(DEVICE), "triton"), dtype, DEVICE)


@every_dtype
@every_spec_kind
def test_gradients(rng, spec, dtype):
    check_gradients(rng, case(rng, spec, 18, 150).to(DEVICE), "triton", dtype)


def test_gradient_in_parts(rng, monkeypatch):
    monkeypatch.setattr(launch, "DENSE_WEIGHTS", 5 * 160)
    check_gradients(rng, case(rng, SPECS[0], 18, 150).to(DEVICE), "triton", torch.float16)


def test_weights_come_back(rng):
    packed = dataclasses.replace(
        random_packed(rng, 18, 150, Spec(4, 32, "kquant")),
        perm=torch.randperm(150, generator=rng).int(),
    ).to(DEVICE)
    linear = W4Linear.from_packed(packed, backend="triton").half()
    for back in (restore(linear.prepared), linear.packed):
        assert all(torch.equal(back.tensors()[name], t) for name, t in packed.tensors().items())
    portable = {name: tensor.cpu() for name, tensor in linear.state_dict().items()}
    other = W4Linear(150, 18, packed.spec, bias=False, backend="reference")
    other.load_state_dict(portable)
    x = torch.randn(3, 150, generator=rng).half()
    assert_close("y", other(x.float()), linear(x.to(DEVICE)), BOUND[torch.float16])
