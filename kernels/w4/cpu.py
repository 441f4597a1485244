"""The CPU matmul (csrc/cpu/w4_matmul.h): packed or 16-bit weights in its own layout."""

from dataclasses import dataclass, field
from typing import Any

import torch

from engine.kernels import native
from engine.kernels.w4.format import Packed, validate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("int8", "exact")


@dataclass(frozen=True, eq=False)
class CpuWeight:
    """One (N, K) matrix laid out for the kernels, in memory of its own."""

    shape: tuple[int, int]
    isa: str  # instruction set the matmul uses: one of `isas()`
    tiles: Any = field(repr=False)  # engine._cpu.W4Tiles

    @classmethod
    def from_packed(cls, packed: Packed, isa: str | None = None) -> "CpuWeight":
        """Copies; `packed` may go. Raises ValueError or TypeError for what it cannot hold."""
        validate(packed)
        if packed.device.type != "cpu":
            raise ValueError(f"packed weight must be on the CPU, found {packed.device}")
        cpu = native.load("cpu")
        matrix = cpu.W4Matrix(**packed.native_fields())
        return cls(packed.shape, _isa(isa), cpu.W4Tiles(matrix, cpu.pool_threads()))

    @classmethod
    def from_tensor(cls, weight: torch.Tensor, isa: str | None = None) -> "CpuWeight":
        """(N, K) float32, float16 or bfloat16 weights, copied unquantised."""
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight must be (N, K), not empty, found {tuple(weight.shape)}")
        if weight.dtype not in DTYPES or weight.device.type != "cpu":
            raise TypeError(
                f"weight must be one of {DTYPES} on the CPU, "
                f"found {weight.dtype} on {weight.device}"
            )
        cpu, (n, k) = native.load("cpu"), weight.shape
        weight = weight.detach().contiguous()
        tiles = cpu.W4Tiles(weight.data_ptr(), _name(weight.dtype), n, k, cpu.pool_threads())
        return cls((n, k), _isa(isa), tiles)

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

    `mode` "exact" keeps activations in float32; "int8" rounds them to 8 bits in blocks of 32 (to
    bfloat16 for 32 rows or more on amx). `threads`: torch's number by default, at most the pool's.
    The result does not depend on it. `out` is written and returned. Raises ValueError, TypeError.
    """
    n, k = weight.shape
    if x.dtype not in DTYPES or x.device.type != "cpu":
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
            rows.data_ptr(),
            len(rows),
            rows.stride(0),
            _name(x.dtype),
            weight.tiles,
            y.data_ptr(),
            y.stride(0) if y.dim() == 2 else n,
            _name(y.dtype),
            0 if bias is None else bias.data_ptr(),
            mode,
            weight.isa,
            threads,
        )
    return y


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
