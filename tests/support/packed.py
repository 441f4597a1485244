"""Random packed matrices of every scheme, for format and kernel tests."""

import torch

from engine.kernels.dtypes import DTYPES, dtype_of
from engine.kernels.w4.format import GROUPS, NF4, Packed, Spec, pack_codes, validate


def every_spec() -> list[Spec]:
    """Every combination of bits, group, scheme and scale dtype that the format has."""
    specs = [
        Spec(bits, group, scheme, dtype)
        for scheme in ("symmetric", "zero", "minimum", "codebook")
        for bits in ((4,) if scheme == "codebook" else (4, 8))
        for group in GROUPS
        for dtype in map(dtype_of, DTYPES)
    ]
    return [*specs, Spec(4, 32, "kquant", torch.float16)]


def spec_id(spec: Spec) -> str:
    dtype = str(spec.scale_dtype).removeprefix("torch.")
    return f"{spec.scheme}-{spec.bits}bit-g{spec.group or 'row'}-{dtype}"


def random_packed(
    rng: torch.Generator, n: int, k: int, spec: Spec, permuted: bool = False
) -> Packed:
    """(n, k) with weights of about unit RMS; every code appears where n * k allows."""

    def below(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, shape, generator=rng, dtype=torch.uint8)

    def real(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng)

    codes, levels, groups = below(1 << spec.bits, n, k), 1 << spec.bits, spec.groups(k)
    count = min(levels, n * k)
    places = torch.randperm(n * k, generator=rng)[:count]
    codes.view(-1)[places] = torch.randperm(levels, generator=rng)[:count].to(torch.uint8)
    step = (0.5 + real(n, groups).abs()) * 4 / levels
    parts = {"scales": (step * real(n, groups).sign()).to(spec.scale_dtype)}
    if spec.scheme == "zero":
        parts["zeros"] = below(levels, n, groups)
    elif spec.scheme == "minimum":
        parts["mins"] = (real(n, groups) - step * levels / 2).to(spec.scale_dtype)
    elif spec.scheme == "codebook":
        parts |= {
            "codebook": torch.tensor(NF4),
            "scales": (2 * real(n, groups)).to(spec.scale_dtype),
        }
    elif spec.scheme == "kquant":
        supers = torch.stack((real(n, -(-k // 256)) / 128, real(n, -(-k // 256)) / 32), dim=-1)
        parts = {"scales": below(64, n, groups), "mins": below(64, n, groups)}
        parts["supers"] = supers.half()
    if permuted:
        parts["perm"] = torch.randperm(k, generator=rng).int()
    return validate(Packed(spec, (n, k), pack_codes(codes, spec.bits), **parts))
