"""The Triton matmul on a GPU: the tests that run interpreted, and what needs a real launch."""

import pytest
import torch
from support.close import assert_close
from support.interpreted_w4 import *  # noqa: F403
from support.packed import random_packed

from engine.kernels import dispatch
from engine.kernels.w4 import launch
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.fused import matmul
from engine.kernels.w4.layout_gpu import to_gpu

pytestmark = pytest.mark.gpu
LAUNCHES = [(most, sizes) for most, sizes in launch.TABLE] + [(launch.DENSE_ROWS, launch.DENSE)]


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip(f"no GPU: {dispatch.why_not('triton')}")


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("most, sizes", LAUNCHES)
def test_real_shapes(rng, most, sizes, dtype):
    packed = random_packed(rng, 4096, 11008, Spec(4, 128, "minimum")).to("cuda")
    weight, dense = to_gpu(packed), unpack(packed).double()
    x = torch.randn(most, 11008, generator=rng).to("cuda", dtype)
    y = matmul(x, weight, gated=True, sizes=sizes)
    gate, up = (x.double() @ dense.T).chunk(2, dim=1)
    bound = 2e-3 if dtype == torch.float16 else 1e-2
    assert_close(f"{sizes}", torch.nn.functional.silu(gate) * up, y, bound)


@pytest.mark.parametrize("m", (1, 40, 2000))
def test_in_a_graph(rng, m):
    packed = random_packed(rng, 2048, 4096, Spec(4, 64, "zero")).to("cuda")
    weight, x = to_gpu(packed), torch.randn(m, 4096, generator=rng).half().cuda()
    expected = matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, weight)
    for _ in range(10):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
