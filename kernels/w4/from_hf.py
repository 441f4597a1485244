"""GPTQ, AWQ, compressed-tensors and bitsandbytes NF4 weights to the packed group format.

Nothing is lost: unpacking gives the source's formula evaluated in float32, bit for bit. Every
function raises ValueError or TypeError, one sentence that starts with `name`. A group of -1 is
the whole row, as those projects write it.
"""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from engine.kernels.w4.format import (
    GROUPS,
    ROW_ALIGN_BYTES,
    Packed,
    Spec,
    check_finite,
    pack_codes,
    validate,
)

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # column j of eight lies in nibble AWQ_ORDER[j] of its word


def gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group: int,
    zero_offset: int,
    borrowed: bool = False,
    name: str = "weight",
) -> Packed:
    """qweight (ceil(K * bits / 32), N), qzeros (G, ceil(N * bits / 32)) int32, scales (G, N).

    g_idx (K,): the group of each input; without order it becomes the permutation. `zero_offset`
    is 1 where zero points are stored less one (checkpoint format "gptq"), 0 for "gptq_v2".
    `borrowed`: GPTQModel takes these ones off whole words, so that a zero point of 0 borrows from
    the one above it; others wrap it alone.
    """
    spec = _spec(name, bits, group, "zero", scales.dtype)
    _require_matrices(name, qweight=qweight, scales=scales)
    k = g_idx.numel() if g_idx is not None else len(qweight) * (32 // bits)
    n, groups = scales.shape[1], spec.groups(k)
    _require(name, "qweight", qweight, (_words(k, bits), n), torch.int32)
    _require(name, "qzeros", qzeros, (groups, _words(n, bits)), torch.int32)
    _require(name, "scales", scales, (groups, n))
    if borrowed:
        ones = zero_offset * (0x11111111 if bits == 4 else 0x01010101)
        qzeros, zero_offset = (qzeros.long() + ones).int(), 0
    zeros = _unpack_words(qzeros, bits)[:, :n] + zero_offset & (1 << bits) - 1
    perm = _order(g_idx, k, spec, name)
    return _zero_packed(
        spec, (n, k), _repack(qweight.T, k, bits, perm), scales.T, zeros.T, perm, name
    )


def awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    *,
    group: int,
    name: str = "weight",
) -> Packed:
    """AWQ "gemm": qweight (K, N / 8), qzeros (G, N / 8) int32, scales (G, N)."""
    spec = _spec(name, 4, group, "zero", scales.dtype)
    _require_matrices(name, qweight=qweight, scales=scales)
    k, n = qweight.shape[0], scales.shape[1]
    _require(name, "qweight", qweight, (k, _words(n, 4)), torch.int32)
    _require(name, "qzeros", qzeros, (spec.groups(k), _words(n, 4)), torch.int32)
    _require(name, "scales", scales, (spec.groups(k), n))

    def ordered(words: torch.Tensor) -> torch.Tensor:
        eights = _unpack_words(words, 4).unflatten(1, (-1, 8))
        return eights[..., list(AWQ_ORDER)].flatten(1)[:, :n].T

    codes = pack_codes(ordered(qweight), 4)
    return _zero_packed(spec, (n, k), codes, scales.T, ordered(qzeros), None, name)


def compressed_tensors(
    weight_packed: torch.Tensor,
    weight_scale: torch.Tensor,
    shape: tuple[int, int],
    weight_zero_point: torch.Tensor | None = None,
    weight_g_idx: torch.Tensor | None = None,
    *,
    bits: int = 4,
    group: int,
    name: str = "weight",
) -> Packed:
    """pack-quantized: weight_packed (N, ceil(K * bits / 32)) int32, weight_scale (N, G).

    weight_zero_point (ceil(N * bits / 32), G) int32 where asymmetric. Codes and zero points are
    stored unsigned, both plus 2**(bits - 1). weight_g_idx (K,); -1 in it means unused.
    """
    n, k = shape
    scheme = "symmetric" if weight_zero_point is None else "zero"
    spec = _spec(name, bits, group, scheme, weight_scale.dtype)
    _require(name, "weight_packed", weight_packed, (n, _words(k, bits)), torch.int32)
    _require(name, "weight_scale", weight_scale, (n, spec.groups(k)))
    if weight_g_idx is not None and -1 in weight_g_idx:
        weight_g_idx = None
    perm = _order(weight_g_idx, k, spec, name)
    codes = _repack(weight_packed, k, bits, perm)
    if weight_zero_point is None:
        packed = Packed(spec, (n, k), codes, weight_scale.contiguous(), perm=perm)
        return check_finite(validate(packed, name), name)
    expected = (_words(n, bits), spec.groups(k))
    _require(name, "weight_zero_point", weight_zero_point, expected, torch.int32)
    zeros = _unpack_words(weight_zero_point.T, bits)[:, :n].T
    return _zero_packed(spec, (n, k), codes, weight_scale, zeros, perm, name)


def nf4(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    shape: tuple[int, int],
    *,
    blocksize: int,
    name: str = "weight",
) -> Packed | None:
    """bitsandbytes: codes (ceil(N * K / 2), 1) uint8, row-major, high nibble first.

    absmax (ceil(N * K / blocksize),) and quant_map (16,) float32. Blocks run on over the row
    ends; None where no listed group lies inside one block, and only `nf4_values` can read them.
    """
    rows = _nf4_rows(codes, absmax, quant_map, shape, blocksize, name)
    group = nf4_group(shape, blocksize)
    if group is None:
        return None
    packed = Packed(
        Spec(4, group, "codebook", torch.float32),
        shape,
        pack_codes(rows, 4),
        absmax[_first_block(shape, group, blocksize)],
        codebook=quant_map.contiguous(),
    )
    return check_finite(validate(packed, name), name)


def nf4_values(
    codes: torch.Tensor,
    absmax: torch.Tensor,
    quant_map: torch.Tensor,
    shape: tuple[int, int],
    *,
    blocksize: int,
    name: str = "weight",
) -> torch.Tensor:
    """What `nf4` holds, (N, K) float32, whatever the blocks straddle."""
    rows = _nf4_rows(codes, absmax, quant_map, shape, blocksize, name)
    scale = absmax.repeat_interleave(min(blocksize, rows.numel()))[: rows.numel()]
    return quant_map[rows.int()] * scale.view(shape)


def nf4_absmax(
    absmax: torch.Tensor,
    nested_quant_map: torch.Tensor,
    nested_absmax: torch.Tensor,
    *,
    nested_blocksize: int,
    nested_offset: float,
    name: str = "weight",
) -> torch.Tensor:
    """Doubly quantized absmax (blocks,) uint8 -> float32, each step rounded once.

    nested_quant_map (256,), nested_absmax (ceil(blocks / nested_blocksize),), both float32.
    """
    blocks = len(absmax)
    _require(name, "absmax", absmax, (blocks,), torch.uint8)
    _require(name, "nested_quant_map", nested_quant_map, (256,), torch.float32)
    outer = -(-blocks // nested_blocksize)
    _require(name, "nested_absmax", nested_absmax, (outer,), torch.float32)
    scale = nested_absmax.repeat_interleave(min(nested_blocksize, blocks))[:blocks]
    return nested_quant_map[absmax.int()] * scale + scale.new_tensor(nested_offset)


def nf4_group(shape: tuple[int, int], blocksize: int) -> int | None:
    """The widest group of which each lies inside one flat block; None where there is none."""
    n, k = shape
    for group in (0, *sorted(GROUPS, reverse=True)[:-1]):
        first, width = _first_block(shape, group, blocksize), group or k
        ends = torch.arange(width, k + width, width, device="cpu").clamp(max=k) - 1
        last = (torch.arange(n, device="cpu")[:, None] * k + ends) // blocksize
        if torch.equal(first, last):
            return group
    return None


def _nf4_rows(codes, absmax, quant_map, shape, blocksize, name) -> torch.Tensor:
    """(N, K) uint8 codes, once every part has the size that the shape asks for."""
    count = shape[0] * shape[1]
    if codes.dtype != torch.uint8 or codes.numel() != (count + 1) // 2:
        raise ValueError(
            f"{name}: 4-bit codes of {tuple(shape)} are {(count + 1) // 2} uint8, "
            f"found {codes.numel()} {codes.dtype}"
        )
    _require(name, "absmax", absmax, (-(-count // blocksize),), torch.float32)
    _require(name, "quant_map", quant_map, (16,), torch.float32)
    flat = codes.flatten()
    return torch.stack((flat >> 4, flat & 15), dim=-1).flatten()[:count].view(shape)


def _first_block(shape: tuple[int, int], group: int, blocksize: int) -> torch.Tensor:
    """(N, G): the flat block in which each group begins."""
    n, k = shape
    rows = torch.arange(n, device="cpu")[:, None]
    return (rows * k + torch.arange(0, k, group or k, device="cpu")) // blocksize


def _spec(name: str, bits: int, group: int, scheme: str, scale_dtype: torch.dtype) -> Spec:
    try:
        return Spec(bits, 0 if group == -1 else group, scheme, scale_dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _zero_packed(spec, shape, codes, scales, zeros, perm, name) -> Packed:
    """Packed with zero points, or symmetric where every zero point is the middle code."""
    packed = Packed(spec, shape, codes, scales.contiguous(), zeros.contiguous(), perm=perm)
    if (packed.zeros == 1 << (spec.bits - 1)).all():
        packed = replace(packed, spec=replace(spec, scheme="symmetric"), zeros=None)
    return check_finite(validate(packed, name), name)


def _order(g_idx: torch.Tensor | None, k: int, spec: Spec, name: str) -> torch.Tensor | None:
    """(K,) int32: inputs sorted by group, their order kept within one; None if they already are."""
    if g_idx is None:
        return None
    _require(name, "g_idx", g_idx, (k,))
    width = spec.group or k
    groups, perm = g_idx.sort(stable=True)
    expected = torch.arange(k, device=g_idx.device) // width
    if not torch.equal(groups.long(), expected):
        at = int((groups != expected).nonzero()[0])
        raise ValueError(
            f"{name}: g_idx must give every group {width} inputs and the last one the rest; in "
            f"sorted order input {at} is in group {int(groups[at])}, expected {int(expected[at])}"
        )
    return None if torch.equal(g_idx, groups) else perm.int()


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _row_bytes(words: torch.Tensor) -> torch.Tensor:
    """(R, C) int32 of any strides -> (R, 4 * C) uint8."""
    return words.contiguous().flatten().view(torch.uint8).view(len(words), -1)


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) int32 -> (R, C * 32 / bits) uint8, lowest bits first."""
    rows = _row_bytes(words)
    return torch.stack((rows & 15, rows >> 4), dim=-1).flatten(1) if bits == 4 else rows


def _repack(words: torch.Tensor, k: int, bits: int, perm: torch.Tensor | None) -> torch.Tensor:
    """(N, words) int32 along K, lowest bits first -> rows of codes in `perm`'s order."""
    if perm is None and k * bits % 32 == 0:  # the words are the rows, but for their padding
        rows = _row_bytes(words)
        return pad(rows, (0, -rows.shape[1] % ROW_ALIGN_BYTES))
    codes = _unpack_words(words, bits)[:, :k]
    return pack_codes(codes if perm is None else codes[:, perm], bits)


def _require_matrices(name: str, **parts: torch.Tensor) -> None:
    for part, tensor in parts.items():
        if tensor.dim() != 2:
            raise ValueError(f"{name}: {part} must be a matrix, found {tuple(tensor.shape)}")


def _require(
    name: str,
    part: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: {part} must be {shape}, found {tuple(tensor.shape)}")
    if dtype is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: {part} must be {dtype}, found {tensor.dtype}")
