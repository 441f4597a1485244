"""The 4-bit ops on Triton: interpreted on a CPU (see interpreted.py), and, called by
test_w4_ops_gpu.py, on a GPU."""

import dataclasses

import pytest
import torch
from support.close import assert_close
from support.ops_checks import BOUND, SPECS, case, check_gradients, check_ops
from support.packed import random_packed, spec_id
from torch import nn

from engine.kernels.w4 import launch
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.lora import adapt
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


@every_dtype
def test_gradients_of_adapters(rng, dtype):
    """Of LoRA on two 4-bit matrices, the first one's through the second, as qlora trains them."""
    peft = pytest.importorskip("peft")
    packed = [case(rng, SPECS[0], *shape).to(DEVICE) for shape in ((40, 70), (24, 40))]
    zero = torch.zeros(40, device=DEVICE, dtype=dtype)
    net = nn.Sequential(*(W4Linear.from_packed(p, zero[: p.shape[0]], backend="triton")
                          for p in packed))  # fmt: skip
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="0|1")
    net = peft.get_peft_model(net, adapt(lora))
    learning = [weight for weight in net.parameters() if weight.requires_grad]
    for weight in learning:
        weight.data = torch.randn(weight.shape, generator=rng).to(DEVICE) / 8
    x, dy = (torch.randn(9, k, generator=rng).to(DEVICE, dtype) / 8 for k in (70, 24))
    (net(x) * dy).float().sum().backward()
    wide = [weight.detach().double().requires_grad_() for weight in learning]
    h = x.double()
    for each, (a, b) in zip(packed, (wide[:2], wide[2:]), strict=True):
        h = h @ unpack(each).double().T + 2 * (h @ a.T) @ b.T
    expected = torch.autograd.grad((h * dy.double()).sum(), wide)
    for weight, right in zip(learning, expected, strict=True):
        assert_close("gradient", right, weight.grad, 2 * BOUND[dtype])


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
