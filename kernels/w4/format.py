"""The group format of quantized weights: 4 or 8 bits, scales along K. Drawn in README.md.

A matrix W is (N, K). Codes lie in groups of `g` along K, G = ceil(K / g), the last group may be
short. Everything a kernel reads is in one `Packed`; `unpack` says what it means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn.functional import pad

from engine.kernels import native
from engine.kernels.dtypes import DTYPES, dtype_of, name_of

VERSION = 1
GROUPS = (0, 16, 32, 64, 128)  # 0: the whole row
SCHEMES = ("symmetric", "zero", "minimum", "codebook", "kquant")
ROW_ALIGN_BYTES = 16  # a row of codes is read in 16-byte loads
SHARED = ("perm", "codebook")  # what all rows have in common
SUPER = 256  # weights under one pair of kquant super-scales
NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105003625, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)  # quantiles of a Gaussian, scaled to [-1, 1]; float32 in every file
IQ4_NL = (
    *(-127, -104, -83, -65, -49, -35, -22, -10),
    *(1, 13, 25, 38, 53, 69, 89, 113),
)  # llama.cpp's `kvalues_iq4nl`: whole numbers, so int8 products have no other error


@dataclass(frozen=True)
class Spec:
    """How one matrix is quantized. Raises ValueError for a combination the format lacks."""

    bits: int  # 4 or 8
    group: int  # codes per scale along K: 16, 32, 64, 128; 0 is the whole row
    scheme: str  # one of SCHEMES
    scale_dtype: torch.dtype = torch.float16  # of scales and mins (kquant: of the super-scales)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, found {self.bits!r}")
        if type(self.group) is not int or self.group not in GROUPS:
            raise ValueError(f"group must be one of {GROUPS} (0: whole row), found {self.group!r}")
        if self.scheme not in SCHEMES:
            raise ValueError(f"scheme must be one of {SCHEMES}, found {self.scheme!r}")
        if name_of(self.scale_dtype) not in DTYPES:
            raise ValueError(f"scale_dtype must be one of {DTYPES}, found {self.scale_dtype}")
        if self.scheme == "codebook" and self.bits != 4:
            raise ValueError(f"scheme 'codebook' has 4 bits, found {self.bits}")
        kquant = (self.bits, self.group, self.scale_dtype)
        if self.scheme == "kquant" and kquant != (4, 32, torch.float16):
            raise ValueError(
                f"scheme 'kquant' has 4 bits, group 32 and float16 super-scales, found {kquant}"
            )

    def groups(self, k: int) -> int:
        """Scales along a row of `k` weights."""
        return -(-k // self.group) if self.group else 1

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of codes, padding included."""
        return -(-k * self.bits // (8 * ROW_ALIGN_BYTES)) * ROW_ALIGN_BYTES

    def to_json(self) -> dict:
        return {
            "version": VERSION,
            "bits": self.bits,
            "group": self.group,
            "scheme": self.scheme,
            "scale_dtype": name_of(self.scale_dtype),
        }

    def native_fields(self) -> dict[str, Any]:
        """The same as keyword arguments of the native functions."""
        fields = self.to_json()
        del fields["version"]
        return fields

    @classmethod
    def from_json(cls, data: dict) -> "Spec":
        """Raises ValueError for a newer version, a missing, an unknown or an unusable field."""
        data = dict(data)
        version = data.pop("version", None)
        if version != VERSION:
            raise ValueError(
                f"quantization spec of version {version!r}, this version reads {VERSION}"
            )
        names = {field.name for field in fields(cls)}
        if data.keys() != names:
            raise ValueError(f"quantization spec needs {sorted(names)}, found {sorted(data)}")
        if data["scale_dtype"] not in DTYPES:
            raise ValueError(f"scale_dtype must be one of {DTYPES}, found {data['scale_dtype']!r}")
        return cls(**data | {"scale_dtype": dtype_of(data["scale_dtype"])})


@dataclass(frozen=True, eq=False)
class Packed:
    """One quantized matrix. Tensors share a device and are contiguous; see `validate`."""

    spec: Spec
    shape: tuple[int, int]  # (N, K)
    codes: torch.Tensor  # (N, row_bytes) uint8; 4 bits: byte j is k=2j (low nibble), 2j+1 (high)
    scales: torch.Tensor  # (N, G) scale_dtype; kquant: (N, G) uint8, 6-bit sub-scales
    zeros: torch.Tensor | None = None  # zero: (N, G) uint8
    mins: torch.Tensor | None = None  # minimum: (N, G) scale_dtype; kquant: (N, G) uint8, 6 bits
    supers: torch.Tensor | None = None  # kquant: (N, ceil(K / 256), 2) float16: d, dmin
    codebook: torch.Tensor | None = None  # codebook: (16,) float32
    perm: torch.Tensor | None = None  # (K,) int32: stored column j is input perm[j]

    @property
    def group(self) -> int:
        """Weights per scale, the whole row spelt out."""
        return self.spec.group or self.shape[1]

    @property
    def groups(self) -> int:
        return self.spec.groups(self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors present, by field name."""
        found = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device | str) -> "Packed":
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return Packed(self.spec, self.shape, **moved)

    def native_fields(self) -> dict[str, Any]:
        """Keyword arguments of the native `Packed`, which borrows these tensors' memory."""
        spans = {name: native.span(tensor) for name, tensor in self.tensors().items()}
        return spans | self.spec.native_fields() | {"n": self.shape[0], "k": self.shape[1]}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def expected_tensors(
    spec: Spec, shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that `spec` stores for `shape`, the optional perm aside."""
    n, k = shape
    grouped = (n, spec.groups(k))
    scale_dtype = torch.uint8 if spec.scheme == "kquant" else spec.scale_dtype
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((n, spec.row_bytes(k)), torch.uint8),
        "scales": (grouped, scale_dtype),
    }
    if spec.scheme == "zero":
        expected["zeros"] = (grouped, torch.uint8)
    if spec.scheme in ("minimum", "kquant"):
        expected["mins"] = (grouped, scale_dtype)
    if spec.scheme == "kquant":
        expected["supers"] = ((n, -(-k // SUPER), 2), torch.float16)
    if spec.scheme == "codebook":
        expected["codebook"] = ((16,), torch.float32)
    return expected


def zeros(spec: Spec, shape: tuple[int, int], device: torch.device | str | None = None) -> Packed:
    """A matrix (N, K) of zeros, on torch's default device unless told: one to load another into."""
    parts = expected_tensors(spec, shape).items()
    tensors = {part: torch.zeros(size, dtype=kind, device=device) for part, (size, kind) in parts}
    return Packed(spec, shape, **tensors)


def validate(packed: Packed, name: str = "packed weight") -> Packed:
    """Returns `packed`; raises ValueError or TypeError, one sentence, where its parts disagree.

    Reads shapes, dtypes and devices, and the values of `perm` only: a mapped file stays unread.
    """
    n, k = packed.shape
    if n < 1 or k < 1:
        raise ValueError(f"{name}: shape must be positive, found {(n, k)}")
    expected = expected_tensors(packed.spec, packed.shape)
    if packed.perm is not None:
        expected["perm"] = ((k,), torch.int32)
    check_tensors(packed.tensors(), expected, packed.device, name)
    if packed.perm is not None and not packed.perm.is_meta and not is_permutation(packed.perm):
        raise ValueError(f"{name}: perm must hold each of 0..{k - 1} once")
    return packed


def check_tensors(
    found: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
    name: str,
) -> None:
    """Raises ValueError or TypeError, one sentence, unless these tensors are there, contiguous and
    on one device."""
    if found.keys() != expected.keys():
        raise ValueError(f"{name}: its scheme stores {sorted(expected)}, found {sorted(found)}")
    for part, (shape, dtype) in expected.items():
        tensor = found[part]
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: {part} must be {dtype}, found {tensor.dtype}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: {part} must be {shape}, found {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name}: {part} is on {tensor.device}, codes are on {device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: {part} must be contiguous, found stride {tensor.stride()}")


def is_permutation(perm: torch.Tensor) -> bool:
    """Whether (K,) integers hold each of 0..K-1 once."""
    return bool((perm.sort().values == torch.arange(len(perm), device=perm.device)).all())


def check_finite(packed: Packed, name: str = "packed weight") -> Packed:
    """Returns `packed`; raises ValueError where a scale, minimum or codebook holds NaN or Inf."""
    for part in ("scales", "mins", "supers", "codebook"):
        tensor = getattr(packed, part)
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name}: {part} must be finite, found NaN or Inf")
    return packed


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, K) uint8 codes below 2**bits -> (N, row_bytes) uint8, padded with zero codes."""
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise TypeError(f"codes must be (N, K) uint8, found {tuple(codes.shape)} {codes.dtype}")
    if bits == 4 and codes.numel() and int(codes.max()) > 15:
        raise ValueError(f"4-bit codes must be below 16, found {int(codes.max())}")
    per_row = ROW_ALIGN_BYTES * 8 // bits
    codes = pad(codes, (0, -codes.shape[1] % per_row))
    rows = codes[:, ::2] | codes[:, 1::2] << 4 if bits == 4 else codes
    return rows.contiguous()


def unpack_codes(packed: Packed) -> torch.Tensor:
    """(N, K) uint8, in stored column order."""
    codes, k = packed.codes, packed.shape[1]
    if packed.spec.bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)
    return codes[:, :k]


def unpack(packed: Packed) -> torch.Tensor:
    """(N, K) float32 on the packed weight's device, columns in their original order.

    Every product and the final sum are rounded once to float32, so results are equal bit for bit
    on every machine.
    """
    k, scheme, parts = packed.shape[1], packed.spec.scheme, packed.tensors()
    scales = packed.scales.float()
    if scheme == "kquant":
        supers = spread(parts["supers"].float(), packed)
        scales, mins = supers[..., 0] * scales, supers[..., 1] * parts["mins"]
    values = steps(packed).mul_(scales[..., None])
    if scheme == "minimum":
        values = values.add_(parts["mins"].float()[..., None])
    elif scheme == "kquant":
        values = values.sub_(mins[..., None])
    values = values.flatten(1)[:, :k]
    return values.contiguous() if packed.perm is None else values[:, packed.perm.argsort()]


def spread(supers: torch.Tensor, packed: Packed) -> torch.Tensor:
    """(N, ceil(K / 256), ...) of a kquant's super-scales -> (N, G, ...): what each group has."""
    return supers.repeat_interleave(SUPER // packed.group, 1)[:, : packed.groups]


def steps(packed: Packed) -> torch.Tensor:
    """(N, G, g) float32, in stored column order, new: what a group's scale is multiplied by."""
    k, groups, scheme, parts = packed.shape[1], packed.groups, packed.spec.scheme, packed.tensors()
    codes = pad(unpack_codes(packed), (0, groups * packed.group - k))
    codes = codes.view(packed.shape[0], groups, packed.group)
    if scheme == "codebook":
        return parts["codebook"][codes.int()]
    if scheme == "symmetric":
        return codes.float().sub_(1 << (packed.spec.bits - 1))
    return codes.float().sub_(parts["zeros"][..., None]) if scheme == "zero" else codes.float()


def concatenate(parts: Sequence[Packed]) -> Packed:
    """Matrices of one spec, K, perm and codebook stacked along N, for fused projections.

    Raises ValueError where they differ.
    """
    first = parts[0]
    for part in parts[1:]:
        if part.spec != first.spec or part.shape[1] != first.shape[1]:
            raise ValueError(
                f"fused weights need one spec and K, found {first.spec}, K={first.shape[1]} "
                f"and {part.spec}, K={part.shape[1]}"
            )
        for shared in SHARED:
            ours, theirs = getattr(first, shared), getattr(part, shared)
            if (ours is None) != (theirs is None) or (
                ours is not None and not torch.equal(ours, theirs)
            ):
                raise ValueError(f"fused weights need one {shared}, found two")
    stacked = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in first.tensors()
        if name not in SHARED
    }
    rows = sum(part.shape[0] for part in parts)
    return Packed(first.spec, (rows, first.shape[1]), **first.tensors() | stacked)


def rows_of(packed: Packed, start: int, stop: int) -> Packed:
    """Rows start .. stop - 1 as views, for the parts of a matrix that was stored fused."""
    n, k = packed.shape
    if not 0 <= start < stop <= n:
        raise ValueError(f"rows must be a part of 0..{n}, found {start}..{stop}")
    return Packed(packed.spec, (stop - start, k), **take(packed.tensors(), slice(start, stop)))


def take(parts: Mapping[str, torch.Tensor], rows: torch.Tensor | slice) -> dict[str, torch.Tensor]:
    """The parts of some rows of a matrix, by ids (R,) int64 or a slice; what all share stays."""
    return {name: part if name in SHARED else part[rows] for name, part in parts.items()}
