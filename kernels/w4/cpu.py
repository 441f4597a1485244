"""The CPU matmul (csrc/cpu/w4_matmul.h): packed or 16-bit weights in its own layout."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.dtypes import DTYPES, name_of
from engine.kernels.w4.format import IQ4_NL, Packed, Spec, validate, zeros
from engine.kernels.w4.from_gguf import check_blocks, from_blocks
from engine.kernels.w4.tiled import TILE_ROWS, Tiled

MODES = ("int8", "exact")
BLOCK_WEIGHTS = 1 << 22  # unpacked at a time: 16 MiB
PIECE_BYTES = 1 << 22  # of GGUF blocks that are laid out at a time


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """One (N, K) matrix laid out for the kernels, in memory that `tiles` keeps alive."""

    shape: tuple[int, int]
    isa: str  # instruction set the matmul uses: one of `isas()`
    tiles: Any = field(repr=False)  # engine._cpu.TiledMatrix

    @classmethod
    def from_packed(cls, packed: Packed, isa: str | None = None) -> "CpuWeight":
        """Copies; `packed` may go. Raises ValueError or TypeError for what it cannot hold."""
        validate(packed)
        if packed.device.type != "cpu":
            raise ValueError(f"packed weight must be on the CPU, found {packed.device}")
        cpu = native.load("cpu")
        tiles = cpu.TiledMatrix(cpu.Packed(**packed.native_fields()), cpu.pool_threads())
        return cls(packed.shape, _isa(isa), tiles)

    @classmethod
    def from_tiled(cls, tiled: Tiled) -> "CpuWeight":
        """Borrows the tiles, or copies them where they do not begin on a multiple of 64 bytes."""
        return cls(tiled.shape, _isa(None), tiled.borrowed())

    @classmethod
    def from_blocks(
        cls,
        type_name: str,
        shape: tuple[int, int],
        data: torch.Tensor,
        name: str = "tensor",
        isa: str | None = None,
        read: Callable[[], object] = lambda: None,
    ) -> "CpuWeight":
        """The weights that `from_gguf.from_blocks` gives, whose errors these are, without the copy
        between: Q5_0, Q5_1, Q5_K and Q6_K in six bits each, which `restore` gives back as bytes.
        `read()` is called after each piece of `data` that is laid out."""
        check_blocks(type_name, shape, data, name)
        cpu, flat, (n, k) = native.load("cpu"), data.contiguous().view(-1), shape
        codebook = torch.tensor(IQ4_NL, dtype=torch.float32, device="cpu")
        tiles = cpu.tiles_of_gguf(type_name, n, k, native.span(codebook))
        row_bytes = flat.numel() // n
        rows = max(PIECE_BYTES // (row_bytes * TILE_ROWS), 1) * TILE_ROWS
        for first in range(0, n, rows):
            piece = native.span(flat[first * row_bytes : (first + rows) * row_bytes])
            if not cpu.fill_gguf(tiles, type_name, piece, first, cpu.pool_threads()):
                # A scale is NaN or Inf.
                return cls.from_packed(from_blocks(type_name, shape, data, name), isa)
            read()
        return cls(shape, _isa(isa), tiles)

    @classmethod
    def from_tensor(cls, weight: torch.Tensor, isa: str | None = None) -> "CpuWeight":
        """(N, K) float32, float16 or bfloat16 weights, copied unquantized."""
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight must be (N, K), not empty, found {tuple(weight.shape)}")
        if name_of(weight.dtype) not in DTYPES or weight.device.type != "cpu":
            raise TypeError(
                f"weight must be one of {DTYPES} on the CPU, "
                f"found {weight.dtype} on {weight.device}"
            )
        cpu, (n, k) = native.load("cpu"), weight.shape
        weight = weight.detach().contiguous()
        tiles = cpu.TiledMatrix(native.span(weight), n, k, cpu.pool_threads())
        return cls((n, k), _isa(isa), tiles)

    @classmethod
    def from_bytes(cls, data: torch.Tensor, isa: str | None = None) -> "CpuWeight":
        """What `to_bytes` gave, or a copy of it, borrowed. Raises ValueError or TypeError."""
        row = data.dim() == 1 and data.is_contiguous()
        if not row or data.dtype != torch.uint8 or data.device.type != "cpu":
            raise TypeError(
                "tiles must be one contiguous row of uint8 on the CPU, "
                f"found {tuple(data.shape)} {data.dtype} on {data.device}"
            )
        tiles = native.load("cpu").TiledMatrix(bytes=native.span(data))
        tiles.stored = data  # as long as the tiles or a view of their bytes are there
        return cls(tiles.shape, _isa(isa), tiles)

    def to_bytes(self) -> torch.Tensor:
        """(bytes,) uint8: the matrix whole, in the memory that it has. Any copy serves as well."""
        return torch.frombuffer(self.tiles, dtype=torch.uint8)

    def restore(self, spec: Spec) -> Packed:
        """What `from_packed` was given, bit for bit. ValueError where it was of another spec."""
        cpu, packed = native.load("cpu"), zeros(spec, self.shape, "cpu")
        if self.tiles.permuted:
            packed = replace(
                packed, perm=torch.zeros(self.shape[1], dtype=torch.int32, device="cpu")
            )
        self.tiles.restore(cpu.Packed(**packed.native_fields()), cpu.pool_threads())
        return packed

    def rows(self, start: int, out: torch.Tensor) -> torch.Tensor:
        """Writes rows start .. start + R - 1 to `out` (R, K), contiguous float32; returns it."""
        n, k = self.shape
        if not 0 <= start <= n - len(out):
            raise ValueError(f"rows must be a part of 0..{n}, found {start}..{start + len(out)}")
        if out.shape[1:] != (k,) or out.dtype != torch.float32 or not out.is_contiguous():
            raise ValueError(
                f"out must be contiguous (R, {k}) float32, found {tuple(out.shape)} {out.dtype}"
            )
        self.tiles.rows(start, start + len(out), native.span(out), torch.get_num_threads())
        return out

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes


def isas() -> list[str]:
    """Instruction sets that the kernels can use on this machine, best first."""
    return native.load("cpu").isas()


def matmul(
    x: torch.Tensor,
    weight: CpuWeight,
    bias: torch.Tensor | None = None,
    mode: str = "int8",
    threads: int | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., K) float32, bfloat16 or float16, bias (N,) -> x @ weight.T + bias, (..., N) as x.

    `mode` "exact" keeps activations in float32; "int8" rounds them to 8 bits in blocks of 32,
    the coarsest of a row twice (to 16 bits beside 8-bit codes and codebooks on avx2, to bfloat16
    for 32 rows or more on amx). `threads`: torch's number by default, at most the pool's. The
    result does not depend on it. `out` is written and returned. Raises ValueError, TypeError.
    """
    n, k = weight.shape
    if name_of(x.dtype) not in DTYPES or x.device.type != "cpu":
        raise TypeError(f"x must be one of {DTYPES} on the CPU, found {x.dtype} on {x.device}")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must be (..., {k}), found {tuple(x.shape)}")
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, found {mode!r}")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, found {threads}")
    if bias is not None:
        if bias.shape != (n,) or bias.device.type != "cpu" or not bias.is_floating_point():
            raise ValueError(
                f"bias must be ({n},) floats on the CPU, "
                f"found {tuple(bias.shape)} {bias.dtype} on {bias.device}"
            )
        bias = bias.detach().float().contiguous()
    shape = (*x.shape[:-1], n)
    y = x.new_empty(shape) if out is None else _checked_out(out, x, shape)
    if y.numel():
        rows = x.detach() if x.dim() == 2 and x.stride(1) == 1 else x.detach().reshape(-1, k)
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        native.load("cpu").w4_matmul(
            native.span(rows),
            len(rows),
            rows.stride(0),
            weight.tiles,
            native.span(y),
            y.stride(0) if y.dim() == 2 else n,
            native.span(bias),
            mode,
            weight.isa,
            threads,
        )
    return y


def matmul_transposed(y: torch.Tensor, weight: CpuWeight) -> torch.Tensor:
    """y (..., N) float32, bfloat16 or float16 -> y @ weight, (..., K) as y, in float32 arithmetic.

    The gradient of `matmul` with respect to x, given that of its result; `weight` is unpacked a few
    rows at a time. Raises ValueError, TypeError.
    """
    n, k = weight.shape
    if name_of(y.dtype) not in DTYPES or y.device.type != "cpu":
        raise TypeError(f"y must be one of {DTYPES} on the CPU, found {y.dtype} on {y.device}")
    if y.dim() == 0 or y.shape[-1] != n:
        raise ValueError(f"y must be (..., {n}), found {tuple(y.shape)}")
    rows = y.reshape(-1, n)
    # As they are said here, whatever torch's defaults are.
    total = torch.zeros(len(rows), k, dtype=torch.float32, device="cpu")
    most = min(max(1, BLOCK_WEIGHTS // k), n)
    block = torch.empty(most, k, dtype=torch.float32, device="cpu")
    for start in range(0, n, len(block)):
        part = weight.rows(start, block[: n - start])
        total.addmm_(rows[:, start : start + len(part)].float(), part)
    return total.to(y.dtype).view(*y.shape[:-1], k)


def _checked_out(out: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    rows_apart = out.dim() == 2 and out.stride(1) == 1 and out.stride(0) >= shape[-1]
    if out.shape != shape or not (out.is_contiguous() or rows_apart):
        raise ValueError(
            f"out must be {shape} with contiguous rows, "
            f"found {tuple(out.shape)} with stride {out.stride()}"
        )
    if out.dtype not in (x.dtype, torch.float32) or out.device.type != "cpu":
        raise TypeError(
            f"out must be {x.dtype} or float32 on the CPU, found {out.dtype} on {out.device}"
        )
    return out


def _isa(name: str | None) -> str:
    found = isas()
    if name is not None and name not in found:
        raise ValueError(f"isa must be one of {found} on this machine, found {name!r}")
    return name or found[0]
