"""Checkpoints whose matrices are packed, each in another scheme, for tests of the runtimes."""

from collections.abc import Sequence
from itertools import cycle

import torch
from support.gguf_blocks import scaled_blocks

from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantize
from engine.kernels.w4.format import NF4, Packed, Spec, pack_codes, unpack, validate

PLAIN = (torch.float32, torch.bfloat16, torch.float16)
SPECS = (
    Spec(4, 32, "minimum"),
    Spec(8, 32, "symmetric"),
    Spec(4, 64, "zero"),
    Spec(4, 32, "kquant"),
    Spec(4, 32, "codebook", torch.float32),
    Spec(8, 16, "symmetric", torch.float32),
    Spec(4, 0, "symmetric", torch.bfloat16),
)


class MixedCheckpoint:
    """A `Checkpoint` over another: its matrices take turns among specs, dtypes and GGUF types.

    Of a GGUF type they become random blocks of their RMS, since nothing here writes every type."""

    def __init__(
        self,
        stored: Checkpoint,
        permuted: bool = False,
        kinds: Sequence[Spec | torch.dtype | str] = (*SPECS, *PLAIN),
    ) -> None:
        self.path, self.config, self._stored = stored.path, stored.config, stored
        turns = cycle(kinds)
        matrices = [name for name in stored.names() if len(stored.shape(name)) == 2]
        self._kinds = {name: next(turns) for name in matrices}
        self._packed: dict[str, Packed | GgufBlocks] = {}
        self._permuted = permuted

    def names(self):
        return self._stored.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored.shape(name)

    def nbytes(self, name: str) -> int:
        return self._stored.nbytes(name)

    def read(self, name: str) -> torch.Tensor:
        packed, kind = self.packed(name), self._kinds.get(name)
        if isinstance(packed, GgufBlocks):
            return dequantize(packed)
        if packed is not None:
            return unpack(packed)
        return self._stored.read(name) if kind is None else self._stored.read(name).to(kind)

    def packed(self, name: str) -> Packed | GgufBlocks | None:
        kind = self._kinds.get(name)
        if not isinstance(kind, Spec | str):
            return None
        if name not in self._packed:
            weight = self._stored.read(name)
            if isinstance(kind, Spec):
                self._packed[name] = quantize(weight, kind, self._permuted)
            else:
                (n, k), rms = weight.shape, float(weight.float().square().mean().sqrt())
                blocks = scaled_blocks(torch.default_generator, kind, n, k, rms)
                self._packed[name] = GgufBlocks(kind, (n, k), blocks)
        return self._packed[name]

    def forget(self) -> None:
        self._stored.forget()


def quantize(weight: torch.Tensor, spec: Spec, permuted: bool = False) -> Packed:
    """(N, K) rounded to the nearest code of its group."""
    n, k = weight.shape
    perm = torch.randperm(k).int() if permuted else None
    weight = weight.float() if perm is None else weight.float()[:, perm]
    codes, parts = torch.empty(n, k, dtype=torch.uint8), []
    for start in range(0, k, spec.group or k):
        columns = slice(start, start + (spec.group or k))
        codes[:, columns], part = _group(weight[:, columns], spec)
        parts.append(part)
    tensors = {name: torch.stack([p[name] for p in parts], dim=1) for name in parts[0]}
    if spec.scheme == "codebook":
        tensors["codebook"] = torch.tensor(NF4)
    if spec.scheme == "kquant":
        tensors["supers"] = torch.full((n, -(-k // 256), 2), 2.0**-8, dtype=torch.float16)
    packed = Packed(spec, (n, k), pack_codes(codes, spec.bits), perm=perm, **tensors)
    return validate(packed)


def _group(w: torch.Tensor, spec: Spec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Codes (N, g) and the parameters (N,) of one group."""
    top, middle = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    low, high, peak = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0), w.abs().amax(1)
    if spec.scheme == "codebook":
        scales = peak.to(spec.scale_dtype)
        distance = (w[..., None] - scales.float()[:, None, None] * torch.tensor(NF4)).abs()
        return distance.argmin(-1), {"scales": scales}
    if spec.scheme == "kquant":  # in steps of the super-scale
        scales = ((high - low) / top * 256).round().clamp(1, 63)
        mins = (-low * 256).round().clamp(0, 63)
        codes = (w * 256 + mins[:, None]) / scales[:, None]
        parts = {"scales": scales.byte(), "mins": mins.byte()}
    elif spec.scheme == "symmetric":
        scales = (peak / (middle - 1)).to(spec.scale_dtype)
        codes, parts = w / scales.float()[:, None] + middle, {"scales": scales}
    else:
        scales = ((high - low) / top).to(spec.scale_dtype)
        step = scales.float()[:, None]
        zeros = (-low / step[:, 0]).round().clamp(0, top)
        if spec.scheme == "zero":
            codes, parts = w / step + zeros[:, None], {"scales": scales, "zeros": zeros.byte()}
        else:
            mins = low.to(spec.scale_dtype)
            codes, parts = (w - mins.float()[:, None]) / step, {"scales": scales, "mins": mins}
    return codes.round().clamp(0, top).byte(), parts
