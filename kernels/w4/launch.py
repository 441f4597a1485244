"""Which kernel runs a matmul, and in what sizes: a pure function over a shipped table.

The sizes are reasoned, not measured, until benchmarks/gpu.sh has run: registers, shared memory and
instructions are those of the compiled kernels (tests/gpu/test_w4_triton.py), bandwidths an H100's.
"""

from dataclasses import dataclass, replace
from functools import cache

from engine.kernels.w4.dequantize import Format


@dataclass(frozen=True)
class Launch:
    """A kernel and its sizes."""

    kernel: str  # "gemv", "gemm", or "dense": dequantize, then torch.matmul
    BLOCK_M: int  # rows of x of a program
    WARPS: int  # of 16 rows of W each
    num_stages: int  # of Triton's pipeline
    SPLITS: int = 1  # gemm: parts of K, added up by a second kernel
    CHUNKS: int = 1  # gemv: of K, that a program has x of in registers
    TILES: int = 1  # gemv: of 16 * WARPS rows of W, that a program goes down

    @property
    def maxnreg(self) -> int | None:
        """Registers of a thread at most: a gemv's programs have a multiprocessor each.

        Untold how many it is to fit, the assembler aims at three or four, and spills for them.
        """
        if self.kernel != "gemv":
            return None
        return min(REGISTERS // (32 * self.WARPS), 255)

    def grid(self, m: int, n: int, k: int, kind: Format, gated: bool) -> tuple[int, int, int]:
        """Programs of a gemv: ranges of W's rows, slices of K, blocks of x's rows."""
        ranges, slices = _ceil(_tiles(n, gated, self), self.TILES), _ceil(k, kind.chunk)
        return ranges, _ceil(slices, self.CHUNKS), _ceil(m, self.BLOCK_M)

    def part_values(self, m: int, grid: tuple[int, int, int]) -> int:
        """float32 of a gemv's scratch."""
        return grid[1] * m * grid[0] * self.TILES * 16 * self.WARPS


# By the most rows of x. A gemv keeps (num_stages - 1) * WARPS * CHUNKS KiB of codes in flight: 64,
# where an H100's latency times its bandwidth is 25 a multiprocessor.
TABLE = (
    (8, Launch("gemv", BLOCK_M=8, WARPS=8, num_stages=3)),
    (16, Launch("gemv", BLOCK_M=16, WARPS=8, num_stages=3)),
    (32, Launch("gemm", BLOCK_M=32, WARPS=4, num_stages=5)),
    (64, Launch("gemm", BLOCK_M=64, WARPS=4, num_stages=4)),
    (1023, Launch("gemm", BLOCK_M=128, WARPS=8, num_stages=3)),
)
# Two stages where a block has no room for three (114,688 bytes, 147,472 on sm_100): 99 KiB on
# sm_86, 89 and 120.
NARROW_TABLE = (*TABLE[:-1], (1023, replace(TABLE[-1][1], num_stages=2)))
GEMV_TABLE = TABLE[:2]
WIDE_BYTES = 160 << 10  # of shared memory a block, that TABLE asks for
DENSE = Launch("dense", BLOCK_M=0, WARPS=4, num_stages=1)
DENSE_ROWS = 1024  # from here on dequantizing once costs less than again for every 128 rows of x
MOST_CHUNKS = 4  # that a gemv's warp takes at once: what lies in shared memory
COLUMNS = 4096  # of x, times its rows, that a warp's registers hold
DENSE_WEIGHTS = 1 << 26  # dequantized at a time: 128 MiB
SPLIT_CHUNKS = 8  # the fewest worth a program of their own
PROGRAMS_PER_CORE = 2  # that a gemm's splits aim at
REGISTERS = 65536  # of a multiprocessor


def table(shared_bytes: int) -> tuple[tuple[int, Launch], ...]:
    """The table for a device whose blocks have so much shared memory at most."""
    return TABLE if shared_bytes >= WIDE_BYTES else NARROW_TABLE


def choose(m: int, n: int, k: int, kind: Format, cores: int, shared_bytes: int) -> Launch:
    """The launch for x (m, k) and W (n, k), on a GPU of so many multiprocessors, whose blocks have
    so much shared memory at most."""
    if m >= DENSE_ROWS:
        return DENSE
    launch = next(launch for most, launch in table(shared_bytes) if m <= most)
    if launch.kernel == "gemv":
        return step(m, n, k, kind, cores)
    chunks = _ceil(k, kind.chunk)
    programs = _ceil(n, 16 * launch.WARPS) * _ceil(m, launch.BLOCK_M)
    splits = min(
        PROGRAMS_PER_CORE * cores // programs,
        chunks // SPLIT_CHUNKS,
        k * kind.bits // (256 * m),  # parts, written and read in float32: a quarter of the codes
    )
    return replace(launch, SPLITS=max(splits, 1))


@cache
def step(m: int, n: int, k: int, kind: Format, cores: int, gated: bool = False) -> Launch:
    """The gemv for x (m, k) and W (n, k): more than 16 rows of x are more programs, which find W in
    the L2.

    Programs are as long as leaves the busiest multiprocessor the least to do, where staging x takes
    a program as long as a tile does; of lengths alike the longest reads x and adds up the least.
    """
    launch = next((launch for most, launch in GEMV_TABLE if m <= most), GEMV_TABLE[-1][1])
    columns, most = COLUMNS // launch.BLOCK_M, MOST_CHUNKS
    if not (kind.whole or kind.scheme == "plain"):
        columns //= 2  # scales take registers too,
        most //= 2  # and as much of shared memory as the codes, with a minimum
    chunks = _ceil(k, kind.chunk)
    held = min(columns // kind.chunk, most, 1 << (chunks - 1).bit_length())
    launch = replace(launch, CHUNKS=held)
    total = _tiles(n, gated, launch)
    others = _ceil(chunks, held) * _ceil(m, launch.BLOCK_M)

    def busiest(tiles: int) -> int:
        return _ceil(_ceil(total, tiles) * others, cores) * (tiles + 1)

    length = min(range(1, total + 1), key=lambda tiles: (busiest(tiles), -tiles))
    return replace(launch, TILES=length)


@dataclass(frozen=True)
class Stripes:
    """Blocks of the CUDA gemv: `ranges` share W's tiles of 16 rows, for each slice of K."""

    ranges: int
    slices: int
    tiles: int

    def part_values(self, m: int) -> int:
        """float32 of its scratch."""
        return self.slices * self.tiles * 16 * m if self.slices > 1 else 0


STRIPE_WARPS, STRIPE_COLUMNS = 16, 512  # of a block, as csrc/cuda/w4_params.h and w4_matmul.h say


def stripes(n: int, k: int, cores: int, gated: bool = False) -> Stripes:
    """The CUDA gemv for W (n, k): a block for a multiprocessor, which stays, but for slices of K
    that are more."""
    tiles, slices = _sixteens(n, gated), _ceil(k, STRIPE_COLUMNS)
    return Stripes(max(1, min(_ceil(tiles, STRIPE_WARPS), cores // slices)), slices, tiles)


def _tiles(n: int, gated: bool, launch: Launch) -> int:
    """That a gemv parts W's rows into."""
    return _ceil(_sixteens(n, gated), launch.WARPS)


def _sixteens(n: int, gated: bool) -> int:
    """Of W's rows, GATED half of them gate and half up."""
    return _ceil(n // 2, 8) if gated else _ceil(n, 16)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def attention(width: int) -> dict[str, int]:
    """Options of decode attention for heads so wide: pages in flight, and the registers of three
    programs a multiprocessor, without which the assembler aims at more and spills."""
    return {"num_warps": 4, "num_stages": 2 if width >= 256 else 3, "maxnreg": 168}
