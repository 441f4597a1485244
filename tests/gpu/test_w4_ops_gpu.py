"""The 4-bit ops on a GPU: the tests that run interpreted, every backend, moves between devices."""

import pytest
import torch
from support.close import assert_close
from support.interpreted_ops import *  # noqa: F403
from support.ops_checks import BOUND, case, check_ops

from engine.kernels import dispatch
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.ops import matmul, prepare

pytestmark = pytest.mark.gpu
Q4_1 = Spec(4, 32, "minimum")


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: {dispatch.why_not('triton')}")


@pytest.mark.parametrize("backend", (None, "cuda", "triton"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_every_backend(rng, backend, dtype):
    if backend == "cuda" and (reason := dispatch.why_not("cuda")):
        pytest.skip(f"backend cuda: {reason}")
    packed = case(rng, Q4_1, 512, 1024).to("cuda")
    matrix, weight = prepare(packed, backend), unpack(packed).double()
    for rows in (0, 1, 8) if backend == "cuda" else (0, 1, 8, 9, 300):
        x = torch.randn(rows, 1024, generator=rng).to("cuda", dtype)
        assert_close(f"{rows} rows", x.double() @ weight.T, matmul(x, matrix), BOUND[dtype])
    if backend is None:
        check_ops(rng, matrix, dtype, "cuda")


def test_moves_between_devices(rng):
    linear = W4Linear.from_packed(case(rng, Q4_1, 64, 256), torch.zeros(64))
    before = linear.state_dict()
    moved = linear.cuda().half()
    assert moved.layout == "gpu" and moved.device.type == "cuda"
    x = torch.randn(5, 256, generator=rng).half()
    on_gpu = moved(x.cuda()).cpu()
    back = moved.cpu()
    assert back.layout == "cpu"
    assert all(torch.equal(back.state_dict()[key], before[key]) for key in before)
    assert_close("cpu", on_gpu.float(), back(x).float(), 1e-2)


def test_a_wrong_device_is_named(rng):
    linear = W4Linear.from_packed(case(rng, Q4_1, 64, 256)).cuda()
    for x in (torch.zeros(2, 256).half(), torch.zeros(20, 256).half()):
        with pytest.raises(ValueError, match="GPU|on cpu"):
            linear(x)
    with pytest.raises(TypeError, match="x must be float16 or bfloat16, found torch.float32"):
        linear(torch.zeros(20, 256, device="cuda"))
