"""Angular distances on a GPU: Gram tiles in float64 on tensor cores, each vector read once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.angular.reference import Sums

PROGRAMS_PER_CORE = 4
# Triton before 3.9 fails to compile products in float64 of what is read in 16 bits.
WIDENS = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 9)


@dataclass(frozen=True)
class Launch:
    """TILES strips of TILE boundaries cover them all; BLOCK_D features are read in a step."""

    TILE: int
    TILES: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 3


# By the most boundaries that a launch takes, TRITON_BOUNDARIES at last: the widest steps that spill
# no register.
LAUNCHES = {
    32: Launch(16, 2, 64, 2),
    48: Launch(16, 3, 32, 2),
    64: Launch(32, 2, 32, 4),
    96: Launch(32, 3, 32, 4),
    128: Launch(64, 2, 32, 8),
}


def choose_launch(boundaries: int) -> Launch:
    """The launch for 2 to 128 boundaries; ValueError beyond."""
    for most, launch in LAUNCHES.items():
        if boundaries <= most:
            return launch
    raise ValueError(f"the triton kernel takes up to {most} boundaries, found {boundaries}")


@triton.jit
def angle_over_pi(cosine):
    """arccos(cosine) / pi in float64; the rational function is fdlibm's for arcsin on [0, 0.5]."""
    a = tl.minimum(tl.abs(cosine), 1.0)
    central = a < 0.5
    z = tl.where(central, a * a, (1 - a) / 2)
    s = tl.where(central, a, tl.sqrt(z))
    p = 7.915349942898145e-4 + z * 3.479331075960212e-5
    p = 0.20121253213486293 + z * (-0.04005553450067941 + z * p)
    p = z * (0.16666666666666666 + z * (-0.3255658186224009 + z * p))
    q = 2.0209457602335057 + z * (-0.6882839716054533 + z * 0.07703815055590194)
    q = 1 + z * (-2.403394911734414 + z * q)
    arcsine = s + s * (p / q)
    angle = tl.where(central, 0.5 - arcsine / 3.141592653589793, 2 * arcsine / 3.141592653589793)
    return tl.where(cosine < 0, 1 - angle, angle)


@triton.jit
def read_strips(
    x_ptr, stride_r, d, R, D,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Features d .. d + BLOCK_D of a sample: strips (TILE, BLOCK_D) float64 of its boundaries."""
    columns = d + tl.arange(0, BLOCK_D)
    strips: tl.tuple = ()
    for t in tl.static_range(TILES):
        rows = t * TILE + tl.arange(0, TILE)
        inside = (rows < R)[:, None] & (columns < D)[None, :]
        at = x_ptr + rows.to(tl.int64)[:, None] * stride_r + columns[None, :]
        strips = strips + (tl.load(at, mask=inside, other=0).to(tl.float64),)
    return strips


@triton.jit
def write_gram(
    gram_ptr, x_ptr, stride_r, R, D,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The upper tiles of one sample's Gram matrix (TILES * TILE)^2 float64."""
    grams: tl.tuple = ()
    for _ in tl.static_range(TILES * (TILES + 1) // 2):
        grams = grams + (tl.zeros((TILE, TILE), tl.float64),)
    for d in range(0, D, BLOCK_D):
        strips = read_strips(x_ptr, stride_r, d, R, D, TILE, TILES, BLOCK_D)
        sums: tl.tuple = ()
        for i in tl.static_range(TILES):
            for j in tl.static_range(i, TILES):
                gram = grams[i * TILES - i * (i - 1) // 2 + j - i]
                product = tl.dot(strips[i], tl.trans(strips[j]), gram, out_dtype=tl.float64)
                sums = sums + (product,)
        grams = sums
    for i in tl.static_range(TILES):
        for j in tl.static_range(i, TILES):
            rows = i * TILE + tl.arange(0, TILE)
            columns = j * TILE + tl.arange(0, TILE)
            at = gram_ptr + rows[:, None] * (TILE * TILES) + columns[None, :]
            tl.store(at, grams[i * TILES - i * (i - 1) // 2 + j - i])


@triton.jit
def angular_kernel(
    x_ptr, weights_ptr, gram_ptr, sums_ptr, squares_ptr, values_ptr, stride_r, stride_b, R, B, D,
    TILE: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Each program takes every G-th sample; its Gram matrix and its sums (4, P) are its own.

    x (R, B, D), weights (B,), gram (G, TILES * TILE, TILES * TILE), sums (G, 4, P),
    squares (R, B), values (B, P); COLUMNS is a power of two that covers R.
    """
    pid = tl.program_id(0)
    G = tl.num_programs(0)
    SIDE: tl.constexpr = TILE * TILES
    ROWS: tl.constexpr = 8
    P = R * (R - 1) // 2
    gram_ptr += pid * SIDE * SIDE
    sums_ptr += pid.to(tl.int64) * 4 * P
    j = tl.arange(0, COLUMNS)[None, :]
    for b in range(pid.to(tl.int64), B, G):
        weight = tl.load(weights_ptr + b)
        if weight > 0:
            sample_ptr = x_ptr + b * stride_b
            write_gram(gram_ptr, sample_ptr, stride_r, R, D, TILE, TILES, BLOCK_D)
            tl.debug_barrier()  # other threads of the program read what these wrote
            jj = tl.load(gram_ptr + j * (SIDE + 1), mask=j < R, other=1)
            tl.store(squares_ptr + j * B + b, jj, mask=j < R)
            for start in range(0, R, ROWS):
                i = start + tl.arange(0, ROWS)[:, None]
                pair = (i < j) & (j < R)
                ii = tl.load(gram_ptr + i * (SIDE + 1), mask=i < R, other=1)
                ij = tl.load(gram_ptr + i * SIDE + j, mask=pair, other=0)
                cosine = ij / tl.sqrt(ii) / tl.sqrt(jj)
                distance = angle_over_pi(cosine)
                change = tl.sqrt(tl.maximum(ii + jj - 2 * ij, 0.0) / jj)
                at = i * (2 * R - i - 1) // 2 + j - i - 1
                add(sums_ptr + at, weight * distance, pair)
                add(sums_ptr + at + P, weight * distance * distance, pair)
                add(sums_ptr + at + 2 * P, weight * cosine, pair)
                add(sums_ptr + at + 3 * P, weight * change, pair)
                if VALUES:
                    tl.store(values_ptr + b * P + at, distance, mask=pair)
            tl.debug_barrier()  # before the next sample's Gram matrix


@triton.jit
def add(at, value, mask):
    tl.store(at, tl.load(at, mask=mask, other=0) + value, mask=mask)


def angular_sums(
    boundaries: Sequence[Tensor], weights: Tensor | None = None, values: bool = False
) -> Sums:
    """As in reference.py, for 2 to 128 boundaries."""
    R, (B, D), device = len(boundaries), boundaries[0].shape, boundaries[0].device
    if WIDENS and boundaries[0].itemsize < 4:
        boundaries = torch.stack(list(boundaries)).float().unbind()
    launch = choose_launch(R)
    x, stride_r, stride_b = _one_tensor(boundaries)
    programs = max(1, min(B, PROGRAMS_PER_CORE * _cores(device)))
    P, side, float64 = R * (R - 1) // 2, launch.TILE * launch.TILES, torch.float64
    gram = torch.empty(programs, side, side, dtype=float64, device=device)
    sums = torch.zeros(programs, 4, P, dtype=float64, device=device)
    squares = torch.ones(R, B, dtype=float64, device=device)
    distances = torch.zeros(B, P, dtype=float64, device=device) if values else None
    ones = torch.ones(B, dtype=float64, device=device)
    weights = ones if weights is None else weights.contiguous()
    with torch.cuda.device_of(sums):
        angular_kernel[(programs,)](
            x,
            weights,
            gram,
            sums,
            squares,
            distances,
            stride_r,
            stride_b,
            R,
            B,
            D,
            COLUMNS=triton.next_power_of_2(R),
            VALUES=values,
            **asdict(launch),
            enable_fp_fusion=True,
        )
    return Sums(sums.sum(0), squares, distances)


def _one_tensor(boundaries: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    """A tensor that starts at boundary 0, and the strides of boundaries and samples from there.

    Copies unless the boundaries lie evenly spaced, as the slices of one tensor do.
    """
    first = boundaries[0]
    starts = [row.data_ptr() for row in boundaries]
    steps = {after - before for before, after in zip(starts, starts[1:], strict=False)}
    strides = {row.stride() for row in boundaries}
    if len(steps) > 1 or len(strides) > 1 or min(steps) % first.itemsize or first.stride(1) != 1:
        x = torch.stack(list(boundaries))
        return x, x.stride(0), x.stride(1)
    return first, steps.pop() // first.itemsize, first.stride(0)


def _cores(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count
