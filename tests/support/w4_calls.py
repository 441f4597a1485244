"""Calls of the fused W4 matmul with random contents, and what they must give."""

import dataclasses
from dataclasses import dataclass

import torch
from support.close import rms_ratio
from support.packed import every_spec, random_packed, spec_id

from engine.kernels.layer.reference import normalised
from engine.kernels.w4.cuda import Call, describe
from engine.kernels.w4.format import Packed, Spec, unpack
from engine.kernels.w4.fusion import PLAIN, Fusion
from engine.kernels.w4.launch import Stripes, stripes
from engine.kernels.w4.layout_gpu import to_gpu

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
EXACT = 1e-5  # float32 outputs, where nothing else is rounded
# Rows of a tile 16, weights of a chunk 128 (4 bits) or 64, of an mma 16, of a lane 4.
EDGES_N, EDGES_K = (1, 2, 15, 16, 17, 34), (1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129)


@dataclass(frozen=True, eq=False)
class Matmul:
    """One call; x and y lie `offset` elements off a multiple of 16 bytes, what stands around half
    as many."""

    name: str
    x: torch.Tensor
    packed: Packed
    bias: torch.Tensor | None = None
    fusion: Fusion = PLAIN
    out_dtype: torch.dtype | None = None
    offset: int = 0
    products: torch.dtype | None = None  # their dtype, that of x unless it is float32
    cores: int = 1  # multiprocessors that blocks are to keep busy
    beside: int = 0  # columns between a row of y and the next
    sums: torch.Tensor | None = None
    out_sums: torch.Tensor | None = None

    def output(self) -> torch.Tensor:
        """NaN, of the output's shape and dtype."""
        n = self.packed.shape[0] // (2 if self.gated else 1)
        shape = len(self.x), n + self.beside
        return torch.full(shape, torch.nan, dtype=self.out_dtype or self.dtype)[:, :n]

    @property
    def gated(self) -> bool:
        return self.fusion.gated

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return self.products or self.x.dtype

    @property
    def sizes(self) -> Stripes:
        return stripes(*self.packed.shape, self.cores, self.gated)

    def scratch(self) -> dict[str, torch.Tensor | None]:
        """By the names of the call's pointers; parts are NaN, counters zeros."""
        given: dict[str, torch.Tensor | None] = {"sums": self.sums, "out_sums": self.out_sums}
        if self.sizes.slices == 1:
            return given
        parts = torch.full((self.sizes.part_values(len(self.x)),), torch.nan)
        counters = torch.zeros(self.sizes.tiles, dtype=torch.int32)
        return given | {"parts": parts, "counters": counters}

    def call(self) -> Call:
        return describe(
            self.x, to_gpu(self.packed), self.output(), self.bias, self.fusion, self.dtype,
            sizes=self.sizes, **self.scratch(),
        )  # fmt: skip


def make(rng, spec: Spec, dtype, m: int, n: int, k: int, **options) -> Matmul:
    """x and x @ w.T of about unit RMS. Options: permuted, bias, norm (one of NORMS), gated,
    out_dtype, offset, strided, cores, beside; what else stands around the product is `step`'s."""
    taken = dict(options)
    packed = random_packed(rng, n, k, spec, permuted=taken.pop("permuted", False))
    width = k + 3 if taken.pop("strided", False) else k
    x = torch.randn(m, width, generator=rng).to(dtype)[:, :k]
    if taken.pop("bias", False):
        taken["bias"] = torch.randn(n, generator=rng).to(dtype)
    norm, gated, fusion = taken.pop("norm", ""), taken.pop("gated", False), {}
    if norm:
        fusion = {"norm": norm, "epsilon": 1e-5, "norm_weight": torch.randn(k, generator=rng)}
    if norm == "layer":
        fusion["norm_bias"] = torch.randn(k, generator=rng)
    taken["fusion"] = Fusion(gated=gated, activation="silu" if gated else "", **fusion)
    name = f"{spec_id(spec)} {dtype} M={m} N={n} K={k} {options}"
    return Matmul(name, x, scaled(packed, k**-0.5), **taken)


def scaled(packed: Packed, factor: float) -> Packed:
    """The matrix times `factor`, its scales rounded anew."""
    names = ("supers",) if packed.spec.scheme == "kquant" else ("scales", "mins")
    tensors = {name: packed.tensors()[name] for name in names if name in packed.tensors()}
    return dataclasses.replace(packed, **{n: t * factor for n, t in tensors.items()})


def random_case(rng, m: int, n: int, k: int) -> Matmul:
    """Any spec, dtype and options."""

    def below(limit: int) -> int:
        return int(torch.randint(0, limit, (), generator=rng))

    specs = every_spec()
    options = {
        "permuted": bool(below(2)),
        "bias": bool(below(2)),
        "norm": ("", "", "rms", "layer")[below(4)],
        "gated": n % 2 == 0 and bool(below(2)),
        "out_dtype": (None, torch.float32)[below(2)],
        "offset": below(8),
        "strided": bool(below(2)),
        "cores": 1 + below(40),
        "beside": below(3),
    }
    return make(rng, specs[below(len(specs))], list(BOUND)[below(2)], m, n, k, **options)


def reference(case: Matmul) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and what errors of few outputs are measured by: the sum of |x| times
    the parts of w, its offset apart (a kernel may sum these apart too)."""
    x, w, tensors = case.x.double(), unpack(case.packed).double(), case.packed.tensors()
    no_offset = {n: torch.zeros_like(tensors[n]) for n in ("zeros", "mins") if n in tensors}
    parts = w.abs() + unpack(dataclasses.replace(case.packed, **no_offset)).double().abs()
    fusion = case.fusion
    if fusion.norm:
        weight, bias = fusion.norm_weight.double(), fusion.norm_bias
        bias = None if bias is None else bias.double()
        x = normalised(x, weight, bias, fusion.epsilon, fusion.norm)
    y, size = x @ w.T, x.abs() @ parts.T
    if case.bias is not None:
        y, size = y + case.bias.double(), size + case.bias.double().abs()
    if case.gated:
        n = case.packed.shape[0] // 2
        y = torch.nn.functional.silu(y[:, :n]) * y[:, n:]
        size = (size[:, :n] + 1) * (size[:, n:] + 1)
    return y, size


def check(case: Matmul, y: torch.Tensor, exact: bool = True) -> None:
    """Holds an output to its bound: the RMS ratio of 256 values or more, each of fewer. `exact`:
    the kernel rounds nothing but what it must."""
    expected, size = reference(case)
    rounded = case.packed.spec.scheme == "codebook" or case.fusion.norm or case.gated
    exact = exact and y.dtype == torch.float32 and not rounded
    bound = EXACT if exact else BOUND[case.x.dtype]
    if y.numel() >= 256:
        found = rms_ratio(expected, y)
    else:
        errors = (y.double() - expected).abs() / size.clamp_min(1e-30)
        found = float(errors.max()) if y.numel() else 0.0
    assert found <= bound, f"{case.name}: error {found:.3g}, bound {bound}"
