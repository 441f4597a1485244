"""Which kernel runs a matmul, and in what sizes: a pure function over a shipped table.

The sizes are reasoned, not measured, until benchmarks/gpu.sh has run: registers, shared memory and
instructions are those of the compiled kernels (tests/gpu/test_w4_triton.py), bandwidths an H100's.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Launch:
    kernel: str  # "gemv", "gemm", or "dense": dequantize, then torch.matmul
    BLOCK_M: int  # rows of x of a program
    WARPS: int  # gemv: chunks of K a step, 16 rows of W; gemm: 16 rows of W each
    num_stages: int  # of Triton's pipeline
    SPLITS: int = 1  # parts of K, added up by a second kernel

    @property
    def maxnreg(self) -> int | None:
        """Registers of a thread at most: what PROGRAMS_PER_CORE gemv programs share.

        Untold how many it is to fit, the assembler aims at three or four, and spills for them.
        """
        if self.kernel != "gemv":
            return None
        return min(REGISTERS // (PROGRAMS_PER_CORE * 32 * self.WARPS), 255)


# By the most rows of x. A gemv keeps (num_stages - 1) * WARPS KiB of codes in flight; with two
# programs on a multiprocessor that is 48 KiB, where an H100's latency times its bandwidth is 18.
TABLE = (
    (8, Launch("gemv", BLOCK_M=8, WARPS=8, num_stages=4)),
    (16, Launch("gemv", BLOCK_M=16, WARPS=8, num_stages=3)),
    (32, Launch("gemm", BLOCK_M=32, WARPS=4, num_stages=5)),
    (64, Launch("gemm", BLOCK_M=64, WARPS=4, num_stages=4)),
    (1023, Launch("gemm", BLOCK_M=128, WARPS=8, num_stages=3)),
)
# Two stages where a block has no room for three (114,688 bytes, 147,472 on sm_100): 99 KiB on
# sm_86, 89 and 120.
NARROW_TABLE = (*TABLE[:-1], (1023, replace(TABLE[-1][1], num_stages=2)))
STEP_TABLE = TABLE[:2]  # of a decode step: see `step`
WIDE_BYTES = 160 << 10  # of shared memory a block, that TABLE asks for
DENSE = Launch("dense", BLOCK_M=0, WARPS=4, num_stages=1)
DENSE_ROWS = 1024  # from here on dequantizing once costs less than again for every 128 rows of x
DENSE_WEIGHTS = 1 << 26  # dequantized at a time: 128 MiB
SPLIT_CHUNKS = 8  # the fewest worth a program of their own
PROGRAMS_PER_CORE = 2  # that a gemv's registers and a gemm's splits aim at
REGISTERS = 65536  # of a multiprocessor


def table(shared_bytes: int) -> tuple[tuple[int, Launch], ...]:
    """The table for a device whose blocks have so much shared memory at most."""
    return TABLE if shared_bytes >= WIDE_BYTES else NARROW_TABLE


def choose(m: int, n: int, k: int, bits: int, cores: int, shared_bytes: int) -> Launch:
    """The launch for x (m, k) and W (n, k), on a GPU of so many multiprocessors, whose blocks have
    so much shared memory at most."""
    if m >= DENSE_ROWS:
        return DENSE
    launch = next(launch for most, launch in table(shared_bytes) if m <= most)
    chunks = -(-k * bits // 512)
    if launch.kernel == "gemv":
        return fitted(launch, chunks)
    programs = -(-n // (16 * launch.WARPS)) * -(-m // launch.BLOCK_M)
    splits = min(
        PROGRAMS_PER_CORE * cores // programs,
        chunks // SPLIT_CHUNKS,
        k * bits // (256 * m),  # parts, written and read in float32: a quarter of the codes' bytes
    )
    return replace(launch, SPLITS=max(splits, 1))


def step(m: int, k: int, bits: int, streams: int) -> Launch:
    """The launch of a decode step's gemv for x (m, k) and W of so many bits.

    `streams` rows of float32 make a row of x, 0 where it comes in 16 bits. They pass through shared
    memory too, so that there are fewer warps; more than 16 rows of x are more programs, which find
    W in the L2.
    """
    launch = next((launch for most, launch in STEP_TABLE if m <= most), STEP_TABLE[-1][1])
    if streams:
        stages = 2 if streams * launch.BLOCK_M > 16 else 3
        launch = replace(launch, WARPS=4, num_stages=stages)
    return fitted(launch, -(-k * bits // 512))


def fitted(launch: Launch, chunks: int) -> Launch:
    """A gemv whose warps all have a chunk of K."""
    return replace(launch, WARPS=min(launch.WARPS, 1 << chunks.bit_length() - 1))


def attention(width: int) -> dict[str, int]:
    """Options of decode attention for heads so wide: pages in flight, and the registers of three
    programs a multiprocessor, without which the assembler aims at more and spills."""
    return {"num_warps": 4, "num_stages": 2 if width >= 256 else 3, "maxnreg": 168}
