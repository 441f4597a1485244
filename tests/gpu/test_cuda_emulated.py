"""The CUDA kernels against float64, run on a CPU under AddressSanitizer and UBSan."""

import dataclasses
import gc
from itertools import product

import pytest
import torch
from support import emulated
from support.emulated import Array, encode_arrays, error_of, message_of, run, run_encoded
from support.packed import every_spec
from support.w4_calls import BOUND, EDGES_K, EDGES_N, Matmul, check, make, random_case, scaled

from engine.kernels.layer import reference
from engine.kernels.w4.cuda import Matrix, describe
from engine.kernels.w4.format import Spec, unpack
from engine.kernels.w4.fusion import ACTIVATIONS, Fusion
from engine.kernels.w4.layout_gpu import to_gpu

G128 = Spec(4, 128, "symmetric")


@pytest.fixture(scope="session")
def kernels():
    return emulated.kernels()


def check_all(kernels, cases: list[Matmul], folder) -> None:
    for case, y in zip(cases, run(kernels, cases, folder), strict=True):
        check(case, y)


@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec(kernels, rng, tmp_path, dtype):
    wide = {"out_dtype": torch.float32}
    cases = [make(rng, spec, dtype, 8, 33, 300, **wide) for spec in every_spec()]
    check_all(kernels, cases, tmp_path)


def test_edges_with_random_options(kernels, rng, tmp_path):
    shapes = product((1, 2, 8), EDGES_N, EDGES_K)
    check_all(kernels, [random_case(rng, *shape) for shape in shapes], tmp_path)


@pytest.mark.slow
def test_sweep(kernels, rng, tmp_path):
    shapes = list(product(range(1, 9), (*EDGES_N, 50), (*EDGES_K, 300, 576, 1021)))
    for _ in range(3):
        check_all(kernels, [random_case(rng, *shape) for shape in shapes], tmp_path)


@pytest.mark.parametrize("bits", (4, 8))
def test_slices_of_x_and_rounds_of_tiles(kernels, rng, tmp_path, bits):
    """K at the edges of slices of 512, and more tiles than a block's 16 warps, by few blocks."""
    specs = Spec(bits, 128, "symmetric"), Spec(bits, 128, "zero"), Spec(bits, 32, "minimum")
    shapes = ((1, 300, 511), (8, 17, 513), (3, 530, 700), (2, 40, 1500))
    cases = [
        make(rng, spec, dtype, *shape, bias=True, norm=norm, cores=cores)
        for spec, shape in zip((*specs, specs[1]), shapes, strict=True)
        for dtype, norm, cores in zip(BOUND, ("", "layer"), (1, 7), strict=True)
    ]
    check_all(kernels, cases, tmp_path)


def test_sums_for_norms(kernels, rng, tmp_path):
    """Those over y, a part for every tile, are what the next norm needs of it: more parts here
    than a block has threads."""
    for norm, cores in (("rms", 1), ("layer", 9)):
        first = make(rng, G128, torch.bfloat16, 5, 600, 600, out_dtype=torch.float32, cores=cores)
        sums = torch.full((first.sizes.tiles + 1, 2, 5), torch.nan)
        first = dataclasses.replace(first, out_sums=sums[:-1])
        (y,) = run(kernels, [first], tmp_path)
        expected = torch.stack((y.square().sum(1), y.sum(1)))
        torch.testing.assert_close(sums[:-1].sum(0), expected, rtol=1e-4, atol=1e-3)
        second = make(rng, G128, torch.bfloat16, 5, 16, 600, norm=norm, out_dtype=torch.float32)
        second = dataclasses.replace(second, x=y, products=torch.bfloat16, sums=first.out_sums)
        (with_sums,) = run(kernels, [second], tmp_path)
        (without,) = run(kernels, [dataclasses.replace(second, sums=None)], tmp_path)
        torch.testing.assert_close(with_sums, without, rtol=2e-3, atol=2e-3)


def test_runs_give_the_same_bits(kernels, rng, tmp_path):
    """In whatever order blocks arrive."""
    case = make(rng, G128, torch.float16, 4, 100, 2100, cores=12, out_dtype=torch.float32)
    ran = run(kernels, [case] * 4, tmp_path)
    assert all(torch.equal(ran[0], y) for y in ran[1:])


def test_hard_values(kernels, rng, tmp_path):
    """Scales below float16's, x whose squares are beyond, and rows whose mean of squares, less the
    square of their mean, is below zero: sums are float32 throughout."""
    spec = Spec(4, 32, "symmetric", torch.float32)
    case = make(rng, spec, torch.float16, 8, 33, 128, out_dtype=torch.float32)
    tiny = dataclasses.replace(case, name="tiny scales", packed=scaled(case.packed, 1e-8))
    fusion = Fusion("rms", 1e-6, torch.full((128,), 1e-3))
    large = dataclasses.replace(case, name="large x", x=case.x * 1e4, fusion=fusion)
    flat = make(rng, G128, torch.float16, 2, 16, 384, norm="layer")
    flat = dataclasses.replace(flat, name="flat x", x=torch.full_like(flat.x, 1999.0))
    check_all(kernels, [tiny, large, flat], tmp_path)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("group", (64, 128))
def test_every_zero_point(kernels, rng, tmp_path, dtype, group):
    """GPTQ stores zero points of 16, a byte holds 255."""
    case = make(rng, Spec(4, group, "zero"), dtype, 3, 64, 4 * group, out_dtype=torch.float32)
    zeros = torch.randperm(256, generator=rng).view(64, 4).to(torch.uint8)
    packed = dataclasses.replace(case.packed, zeros=zeros)
    check_all(kernels, [dataclasses.replace(case, packed=packed)], tmp_path)


def around_step(rng, dtype, wide: bool = False) -> tuple[Matmul, torch.Tensor, torch.Tensor]:
    """A launch as a decode step makes it, and the stream and y in float64; `wide`: of several
    slices of K and ranges of W's rows, and with a delta."""

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=rng))

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    specs = every_spec()
    m, n, k = 1 + below(8), 2 * (1 + below(20)), EDGES_K[below(len(EDGES_K))]
    n, k = (560, 1100) if wide else (n, k)
    permuted, norm = bool(below(2)), ("", "rms", "layer")[below(3)]
    options = {"permuted": permuted, "bias": True, "offset": below(8), "cores": 6 if wide else 1}
    options["beside"] = beside = below(3)
    case = make(rng, specs[below(len(specs))], dtype, m, n, k, **options)
    activation, gate = ACTIVATIONS[below(len(ACTIVATIONS))], ("", "stacked", "apart")[below(3)]
    outputs = n // 2 if gate == "stacked" else n
    options = {"norm": norm, "epsilon": 1e-5, "gated": gate == "stacked", "activation": activation}
    if norm:
        options["norm_weight"] = real(k)
        options["norm_bias"] = real(k) if norm == "layer" else None
    if wide or below(2):
        options |= {"delta": real(m, k), "post": real(k), "stream": torch.full((m, k), torch.nan)}
    if gate == "apart":
        options["gate"] = real(m, outputs + beside)[:, :outputs]
    options |= {"cap": (0.0, 3.0)[below(2)], "add": real(m, outputs + beside)[:, :outputs]}
    options["live"] = torch.randint(0, 2, (m,), generator=rng).int()
    case = dataclasses.replace(
        case, x=real(m, k), products=dtype, fusion=Fusion(**options), out_dtype=torch.float32
    )
    x = case.x.double()
    if "delta" in options:
        x = reference.returned(x, options["delta"].double(), options["post"].double(), 1e-5)
    y = x
    if norm:
        bias = options["norm_bias"]
        weight, bias = options["norm_weight"].double(), None if bias is None else bias.double()
        y = reference.normalised(x, weight, bias, 1e-5, norm)
    y = y @ unpack(case.packed).double().T + case.bias.double()
    activate = reference.ACTIVATIONS.get(activation, lambda x: x)
    if gate == "stacked":
        y = activate(y[:, :outputs]) * y[:, outputs:]
    else:
        y = activate(options["gate"].double()) * y if gate else activate(y)
    y = options["cap"] * torch.tanh(y / options["cap"]) if options["cap"] else y
    y = torch.where(options["live"][:, None] != 0, y, 0) + options["add"].double()
    return case, x, y


def test_what_stands_around(kernels, rng, tmp_path):
    made = [around_step(rng, dtype, i == 0) for dtype in BOUND for i in range(30)]
    for (case, x, y), got in zip(
        made, run(kernels, [c for c, _, _ in made], tmp_path), strict=True
    ):
        if case.fusion.stream is not None:
            torch.testing.assert_close(case.fusion.stream.double(), x, rtol=1e-5, atol=1e-5)
        bound = 10 * BOUND[case.dtype] * (1 + y.abs() + y.square().mean().sqrt())
        assert ((got - y).abs() <= bound).all(), case.fusion


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_no_activation_hides_what_is_no_number(kernels, rng, tmp_path, activation):
    case = make(rng, G128, torch.float16, 2, 16, 128, out_dtype=torch.float32)
    x = case.x.clone()
    x[1, 5] = torch.nan
    fusion = Fusion(activation=activation)
    (y,) = run(kernels, [dataclasses.replace(case, x=x, fusion=fusion)], tmp_path)
    assert y[0].isfinite().all() and y[1].isnan().all()


def test_no_rows(kernels, rng, tmp_path):
    check_all(kernels, [make(rng, G128, torch.float16, 0, 17, 128)], tmp_path)


def test_native_errors(kernels, rng, tmp_path):
    case = make(rng, G128, torch.float16, 2, 16, 128)

    def error(**fields) -> str:
        call = case.call()
        for name, value in fields.items():
            setattr(call.weights if hasattr(call.weights, name) else call, name, value)
        return error_of(kernels, case, call, tmp_path)

    assert error() == ""
    assert error(m=9) == "w4_matmul: x must have 0 to 8 rows, found 9"
    assert "empty" in error(k=0)
    assert "bits must be 4, or 8 without a codebook or super-scales, found 5" in error(bits=5)
    assert "bits must be 4, or 8" in error(bits=8, scheme=3)
    assert error(group=48).endswith("group must be 0, 16, 32, 64 or 128, found 48")
    assert "products must be of float16 or bfloat16" in error(type=2)
    assert "x and y must have the type of products or float32" in error(y_type=1)
    assert "delta needs post and stream" in error(delta=8)
    assert "a norm needs its weights" in error(norm_kind=1)
    assert "even number of rows" in error(gated=1, n=15)
    assert "ranges must be 1 or more, found 0" in error(ranges=0)
    assert "slices need parts and counters" in error(k=513, parts=0)
    assert "sums need a norm, and no delta" in error(sums=8)
    assert "sums need a norm" in error(sums=8, norm_kind=1, norm=8, sum_parts=0)
    assert "x and y must have the type of products or float32" in error(x_type=1)
    for fields in ({"k": 2**30}, {"n": 2**28, "group": 16}, {"n": 2**29}):
        assert "the weight matrix is too large" in error(**fields)
    codes = to_gpu(case.packed).codes
    moved = Array(Matrix.codes.offset, codes, written=False, before=False, offset=8)
    data = run_encoded(kernels, [encode_arrays(case.call(), [moved])], tmp_path)
    assert "codes must lie on a multiple of 16 bytes" in message_of(data)


def test_a_call_keeps_its_tensors(rng):
    """A list of launches outlives the scratch that grew while it was made."""
    case = make(rng, G128, torch.float16, 2, 16, 600)
    call = case.call()
    gc.collect()
    for name in ("parts", "counters", "y"):
        assert getattr(call, name) == call.borrowed[name].data_ptr()
    assert call.weights.codes == call.borrowed["codes"].data_ptr()


def test_any_stride_of_a_bias(rng):
    """As the Triton matmul takes it."""
    case = make(rng, G128, torch.float16, 2, 16, 128, bias=True)
    call = dataclasses.replace(case, bias=case.bias.repeat_interleave(2)[::2]).call()
    read = call.borrowed["bias"]
    assert read.is_contiguous() and torch.equal(read, case.bias) and call.bias == read.data_ptr()


def test_python_errors(rng):
    case = make(rng, G128, torch.float16, 2, 16, 128)
    x, y, weights = case.x, case.output(), to_gpu(case.packed)

    def raises(kind, message: str, **arguments) -> None:
        with pytest.raises(kind, match=message):
            describe(**({"x": x, "weights": weights, "y": y, "sizes": case.sizes} | arguments))

    raises(TypeError, "x must be float16 or bfloat16, found torch.float32", x=x.float())
    raises(ValueError, r"x must be \(M, 128\) with M <= 8, found \(2, 64\)", x=x[:, :64])
    raises(ValueError, r"found \(9, 128\)", x=torch.zeros(9, 128).half())
    raises(ValueError, r"x must be a contiguous \(2, 128\)", x=torch.zeros(128, 2).half().T)
    raises(TypeError, "y must be torch.float16 or torch.float32", y=y.bfloat16())
    raises(ValueError, r"y must be a contiguous \(2, 16\)", y=y[:, :8])
    raises(ValueError, r"bias must be a contiguous \(16,\) torch.float16", bias=torch.zeros(16))
    odd = to_gpu(make(rng, G128, torch.float16, 2, 15, 128).packed)
    raises(ValueError, "even number of rows, found 15", weights=odd, fusion=Fusion(gated=True))
    moved = {name: tensor.to("meta") for name, tensor in weights.tensors().items()}
    elsewhere = dataclasses.replace(weights, **moved)
    raises(ValueError, "weight is on meta, x is on cpu", weights=elsewhere)
    raises(ValueError, r"live must be a contiguous \(2,\)", fusion=Fusion(live=torch.ones(3).int()))
    raises(ValueError, "norm must be a contiguous", fusion=Fusion("rms", 1e-5, torch.zeros(64)))
    raises(ValueError, "y is on meta, x is on cpu", y=y.to("meta"))
    three = dataclasses.replace(case.sizes, slices=3)
    raises(ValueError, r"parts must be a contiguous \(96,\)", sizes=three, parts=torch.zeros(95))
    raises(ValueError, "parts must be", sizes=three, parts=torch.zeros(192)[::2])
    raises(ValueError, "parts is on meta", sizes=three, parts=torch.zeros(96, device="meta"))
    raises(ValueError, "counters must be a contiguous", sizes=three, counters=torch.zeros(9))
    raises(ValueError, r"sums must be a contiguous \(0, 2, 2\)", sums=torch.zeros(4, 2, 3))
    raises(ValueError, r"out_sums must be a contiguous \(1, 2, 2\)", out_sums=torch.zeros(0, 2, 2))
