"""The CUDA kernels against float64, run on a CPU under AddressSanitizer and UBSan."""

import dataclasses
from itertools import product

import pytest
import torch
from close import rms_ratio
from emulated import Matmul, build, error_of, run
from packed import every_spec, random_packed, spec_id

from engine.kernels.w4.cuda import Norm, describe
from engine.kernels.w4.format import Packed, Spec, unpack
from engine.kernels.w4.layout_gpu import to_gpu

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXACT = 1e-5  # float32 outputs, where nothing else is rounded
G128 = Spec(4, 128, "symmetric")


@pytest.fixture(scope="session")
def kernels():
    return build("w4", "csrc/cuda/w4_matmul.cu", "tests/emulated.cpp")


def reference(matmul: Matmul, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and what errors of few outputs are measured by: the sum of |x| times
    the parts of w, its offset apart (a kernel may sum these apart too)."""
    x, w = matmul.x.double(), unpack(packed).double()
    offsets = {
        name: packed.tensors()[name] for name in ("zeros", "mins") if name in packed.tensors()
    }
    without = {name: torch.zeros_like(tensor) for name, tensor in offsets.items()}
    parts = w.abs() + unpack(dataclasses.replace(packed, **without)).double().abs()
    if matmul.norm:
        x = x * (x.square().mean(dim=1, keepdim=True) + matmul.norm.eps).rsqrt()
        x = x * (matmul.norm.weight.double() + matmul.norm.offset)
    y, size = x @ w.T, x.abs() @ parts.T
    if matmul.bias is not None:
        y, size = y + matmul.bias.double(), size + matmul.bias.double().abs()
    if matmul.gated:
        n = packed.shape[0] // 2
        y = torch.nn.functional.silu(y[:, :n]) * y[:, n:]
        size = (size[:, :n] + 1) * (size[:, n:] + 1)
    return y, size


def scaled(packed: Packed, factor: float) -> Packed:
    """The matrix times `factor`, its scales rounded anew."""
    names = ("supers",) if packed.spec.scheme == "kquant" else ("scales", "mins")
    tensors = {name: packed.tensors()[name] for name in names if name in packed.tensors()}
    return dataclasses.replace(packed, **{n: t * factor for n, t in tensors.items()})


def check(kernels, folder, cases: list[tuple[str, Matmul, Packed]]) -> None:
    """Runs all and holds each to its bound."""
    outputs = run(kernels, [matmul for _, matmul, _ in cases], folder)
    for (name, matmul, packed), y in zip(cases, outputs, strict=True):
        expected, size = reference(matmul, packed)
        exact = packed.spec.scheme != "codebook" and y.dtype == torch.float32 and not matmul.norm
        bound = EXACT if exact and not matmul.gated else BOUND[matmul.x.dtype]
        if y.numel() >= 256:
            found = rms_ratio(expected, y)
        else:
            errors = (y.double() - expected).abs() / size.clamp_min(1e-30)
            found = float(errors.max()) if y.numel() else 0.0
        assert found <= bound, f"{name}: error {found:.3g}, bound {bound}"


def make(rng, spec: Spec, dtype, m: int, n: int, k: int, **options) -> tuple[str, Matmul, Packed]:
    """A named case: x and x @ w.T of about unit RMS. Options: permuted, bias, norm (the offset),
    gated, out_dtype, offset, strided."""
    taken = dict(options)
    packed = random_packed(rng, n, k, spec, permuted=taken.pop("permuted", False))
    packed = scaled(packed, k**-0.5)
    x = torch.randn(m, k + 3 if taken.pop("strided", False) else k, generator=rng).to(dtype)[:, :k]
    if taken.pop("bias", False):
        taken["bias"] = torch.randn(n, generator=rng).to(dtype)
    norm_offset = taken.pop("norm", None)
    if norm_offset is not None:
        weight = torch.randn(k, generator=rng).to(dtype)
        taken["norm"] = Norm(weight, eps=1e-5, offset=norm_offset)
    name = f"{spec_id(spec)} {dtype} M={m} N={n} K={k} {options}"
    return name, Matmul(x, to_gpu(packed), **taken), packed


@pytest.mark.parametrize("dtype", BOUND)
def test_every_spec(kernels, rng, tmp_path, dtype):
    cases = [make(rng, spec, dtype, 8, 33, 300, out_dtype=torch.float32) for spec in every_spec()]
    check(kernels, tmp_path, cases)


def random_options(rng, n: int) -> dict:
    def flip() -> bool:
        return bool(torch.randint(0, 2, (), generator=rng))

    return {
        "permuted": flip(),
        "bias": flip(),
        "norm": float(flip()) if flip() else None,
        "gated": n % 2 == 0 and flip(),
        "out_dtype": torch.float32 if flip() else None,
        "offset": int(torch.randint(0, 8, (), generator=rng)),
        "strided": flip(),
    }


def random_cases(rng, shapes) -> list[tuple[str, Matmul, Packed]]:
    specs, dtypes = every_spec(), list(BOUND)
    cases = []
    for m, n, k in shapes:
        spec = specs[int(torch.randint(0, len(specs), (), generator=rng))]
        dtype = dtypes[int(torch.randint(0, 2, (), generator=rng))]
        cases.append(make(rng, spec, dtype, m, n, k, **random_options(rng, n)))
    return cases


# Rows of a tile 16, weights of a chunk 128 (4 bits) or 64, of an mma 16, of a lane 4.
EDGES_N, EDGES_K = (1, 2, 15, 16, 17, 34), (1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129)


def test_edges_with_random_options(kernels, rng, tmp_path):
    check(kernels, tmp_path, random_cases(rng, product((1, 2, 8), EDGES_N, EDGES_K)))


@pytest.mark.slow
def test_sweep(kernels, rng, tmp_path):
    shapes = list(product(range(1, 9), (*EDGES_N, 50), (*EDGES_K, 300, 576, 1021)))
    for _ in range(3):
        check(kernels, tmp_path, random_cases(rng, shapes))


@pytest.mark.parametrize("bits", (4, 8))
def test_more_chunks_than_fly_and_more_x_than_fits(kernels, rng, tmp_path, bits):
    """K beyond 8 warps x 4 chunks, and at M = 8 beyond the slice of x in shared memory."""
    chunk = 512 // bits
    spec = Spec(bits, 32, "minimum")
    cases = [
        make(rng, spec, dtype, m, 3, k, bias=True, norm=norm)
        for dtype in BOUND
        for m, k in ((1, 33 * chunk + 4), (8, 65 * chunk + 1))
        for norm in (None, 1.0)
    ]
    check(kernels, tmp_path, cases)


def test_hard_values(kernels, rng, tmp_path):
    """Scales beyond float16, and x whose squares are: sums are float32 throughout."""
    spec = Spec(4, 32, "symmetric", torch.float32)
    _, matmul, packed = make(rng, spec, torch.float16, 8, 33, 128, out_dtype=torch.float32)
    tiny = scaled(packed, 1e-8)
    weight = torch.full((128,), 1e-3, dtype=torch.float16)
    large = dataclasses.replace(matmul, x=matmul.x * 1e4, norm=Norm(weight, eps=1e-6))
    cases = [
        ("tiny scales", dataclasses.replace(matmul, weights=to_gpu(tiny)), tiny),
        ("large x", large, packed),
    ]
    check(kernels, tmp_path, cases)


def test_no_rows(kernels, rng, tmp_path):
    check(kernels, tmp_path, [make(rng, G128, torch.float16, 0, 17, 128)])


def test_native_errors(kernels, rng, tmp_path):
    _, matmul, _ = make(rng, G128, torch.float16, 2, 16, 128)

    def error(**fields) -> str:
        call = matmul.call()
        for name, value in fields.items():
            owner = call.weights if hasattr(call.weights, name) else call
            setattr(owner, name, value)
        return error_of(kernels, matmul, call, tmp_path)

    assert error() == ""
    assert error(m=9) == "w4_matmul: x must have 0 to 8 rows, found 9"
    assert "empty" in error(k=0)
    assert "bits must be 4, or 8 without a codebook or super-scales, found 5" in error(bits=5)
    assert "bits must be 4, or 8" in error(bits=8, scheme=3)
    assert error(group=48).endswith("group must be 0, 16, 32, 64 or 128, found 48")
    assert "x must be float16 or bfloat16" in error(x_type=2)
    assert "y must have the type of x or float32" in error(y_type=1)
    assert "even number of rows" in error(gated=1, n=15)


def test_python_errors(rng):
    _, matmul, _ = make(rng, G128, torch.float16, 2, 16, 128)
    x, weights, y = matmul.x, matmul.weights, matmul.output()

    def raises(kind, message: str, **arguments) -> None:
        with pytest.raises(kind, match=message):
            describe(**({"x": x, "weights": weights, "y": y} | arguments))

    raises(TypeError, "x must be float16 or bfloat16, found torch.float32", x=x.float())
    raises(ValueError, r"x must be \(M, 128\) with M <= 8, found \(2, 64\)", x=x[:, :64])
    raises(ValueError, r"found \(9, 128\)", x=torch.zeros(9, 128).half())
    raises(ValueError, "rows of x must be contiguous", x=torch.zeros(128, 2).half().T)
    raises(TypeError, "y must be torch.float16 or torch.float32", y=y.bfloat16())
    raises(ValueError, r"y must be a contiguous \(2, 16\)", y=y[:, :8])
    raises(ValueError, r"bias must be a contiguous \(16,\) torch.float16", bias=torch.zeros(16))
    raises(ValueError, "norm must be a contiguous", norm=Norm(torch.zeros(64).half(), 1e-5))
    raises(ValueError, "x is on cpu", y=y.to("meta"))
