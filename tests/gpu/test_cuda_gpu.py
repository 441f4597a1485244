"""The CUDA kernels on a GPU. What needs none is in test_cuda_emulated.py."""

import ctypes
import dataclasses
from itertools import product

import pytest
import torch
from support import attention_calls
from support.close import assert_close
from support.packed import every_spec, random_packed
from support.w4_calls import BOUND, EDGES_K, EDGES_N, Matmul, check, make, random_case

from engine.kernels import native
from engine.kernels.layer import cuda as attention
from engine.kernels.w4.cuda import Call, cores_of, describe, matmul
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.fusion import Fusion
from engine.kernels.w4.layout_gpu import to_gpu

pytestmark = pytest.mark.gpu
GUARD = 64  # elements on either side of an output


@pytest.fixture(autouse=True)
def gpu():
    if reason := native.error("cuda"):
        pytest.skip(f"engine._cuda does not load: {reason}")
    if not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")


def run(case: Matmul) -> torch.Tensor:
    """The output, on the CPU; fails where a byte around it changed."""
    width = case.x.stride(0) if len(case.x) else case.x.shape[1]
    storage = torch.zeros(case.offset + len(case.x) * width, dtype=case.x.dtype, device="cuda")
    x = storage[case.offset :].view(len(case.x), width)[:, : case.x.shape[1]].copy_(case.x)
    bias = None if case.bias is None else case.bias.cuda()
    held = {field.name: getattr(case.fusion, field.name) for field in dataclasses.fields(Fusion)}
    moved = {name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in held.items()}
    y = case.output()
    guarded = torch.full((y.numel() + 2 * GUARD,), torch.nan, dtype=y.dtype, device="cuda")
    out = guarded[GUARD : GUARD + y.numel()].view(y.shape)
    weights = to_gpu(case.packed.to("cuda"))
    sizes = dataclasses.replace(case, cores=cores_of(x.device)).sizes
    parts = torch.full((sizes.part_values(len(x)),), torch.nan, device="cuda")
    counters = torch.zeros(sizes.tiles, dtype=torch.int32, device="cuda")
    call = describe(
        x, weights, out, bias, Fusion(**moved), sizes=sizes, parts=parts, counters=counters
    )
    native.load("cuda").w4_matmul(ctypes.addressof(call), torch.cuda.current_stream().cuda_stream)
    guards = torch.cat((guarded[:GUARD], guarded[GUARD + y.numel() :]))
    assert guards.isnan().all(), f"{case.name}: wrote outside its output"
    assert not counters.any()
    return out.cpu()


def test_the_struct_is_the_one_of_python():
    cuda = native.load("cuda")
    assert cuda.W4_MATMUL_BYTES == ctypes.sizeof(Call)
    assert cuda.DECODE_ATTENTION_BYTES == ctypes.sizeof(attention.Call)


@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec(rng, dtype):
    for spec in every_spec():
        case = make(rng, spec, dtype, 8, 33, 300, out_dtype=torch.float32)
        check(case, run(case))


def test_edges_with_random_options(rng):
    for m, n, k in product(range(9), EDGES_N, (*EDGES_K, 4097, 8200)):
        case = random_case(rng, m, n, k)
        check(case, run(case))


@pytest.mark.parametrize("dtype", attention_calls.BOUND)
def test_attention(rng, dtype):
    for _ in range(100):
        case = attention_calls.random_case(rng, dtype)
        held = {field.name: getattr(case, field.name) for field in dataclasses.fields(case)}
        options = dict(case.options)
        options["norms"] = tuple(None if norm is None else norm.cuda() for norm in options["norms"])
        options["angles"] = None if options["angles"] is None else options["angles"].cuda()
        moved = {n: v.cuda() if isinstance(v, torch.Tensor) else v for n, v in held.items()}
        on_gpu = attention_calls.Attention(**moved | {"options": options})
        attention.launch(on_gpu.call(), torch.device("cuda"))
        names = ("store", "y", "counters", "parts")
        back = {name: getattr(on_gpu, name).cpu() for name in names}
        attention_calls.check(case, dataclasses.replace(case, **back))


@pytest.mark.parametrize("shape", ((4096, 4096), (28672, 4096), (4096, 14336)))
def test_shapes_of_llama_3_8b(rng, shape):
    n, k = shape
    packed = random_packed(rng, n, k, Spec(4, 128, "symmetric")).to("cuda")
    x = torch.randn(8, k, generator=rng).half().cuda()
    expected = x.double() @ unpack(packed).double().T
    for m in (1, 8):
        y = matmul(x[:m], to_gpu(packed), out_dtype=torch.float32)
        assert_close(f"{shape} M={m}", expected[:m], y, 1e-5)


@pytest.mark.parametrize("overlap", (False, True))
def test_chain_in_a_graph(rng, overlap):
    """Each matmul reads the one before it, also where they overlap."""
    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("kernels overlap from compute capability 9.0")
    packed = random_packed(rng, 2048, 2048, Spec(4, 64, "minimum")).to("cuda")
    weights = to_gpu(packed)
    fusion = Fusion("rms", 1e-6, torch.ones(2048, device="cuda"))
    start = torch.randn(2, 2048, generator=rng).half().cuda()

    def chain(overlap: bool) -> torch.Tensor:
        x = start
        for _ in range(20):
            x = matmul(x, weights, fusion=fusion, overlap=overlap)
        return x

    expected = chain(False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(overlap)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        y.fill_(torch.nan)
        graph.replay()
        wrong += (y != expected).sum()
    assert int(wrong) == 0


def test_tensors_off_the_gpu_are_refused(rng):
    case = make(rng, Spec(4, 128, "symmetric"), torch.float16, 1, 16, 128)
    with pytest.raises(ValueError, match="x must be on a GPU, found cpu"):
        matmul(case.x, to_gpu(case.packed))
