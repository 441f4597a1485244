"""The block formats of GGUF tensors, and their values in float32.

A row of K weights is K / `weights` blocks of `nbytes` bytes.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_CHUNK_WEIGHTS = 1 << 14  # dequantized at a time: what numpy allocates for them is used again


@dataclass(frozen=True)
class BlockType:
    """`dtype` is set for plain numbers, None for quantized blocks."""

    name: str
    weights: int
    nbytes: int
    dtype: str | None = None  # torch's name


@dataclass(frozen=True)
class GgufBlocks:
    """A quantized matrix as stored: `data` is (N, bytes a row) uint8, `shape` is (N, K)."""

    type: str
    shape: tuple[int, int]
    data: "torch.Tensor"


BLOCK_TYPES = {
    0: BlockType("F32", 1, 4, "float32"),
    1: BlockType("F16", 1, 2, "float16"),
    2: BlockType("Q4_0", 32, 18),
    3: BlockType("Q4_1", 32, 20),
    6: BlockType("Q5_0", 32, 22),
    7: BlockType("Q5_1", 32, 24),
    8: BlockType("Q8_0", 32, 34),
    12: BlockType("Q4_K", 256, 144),
    13: BlockType("Q5_K", 256, 176),
    14: BlockType("Q6_K", 256, 210),
    20: BlockType("IQ4_NL", 32, 18),
    30: BlockType("BF16", 1, 2, "bfloat16"),
}

# ik_llama.cpp's own types, from 133 on; 200 more than a type is that with its rows interleaved.
_OF_IK = (
    *("Q6_0", "IQ1_BN", "IQ2_BN", "Q8_K64", "IQ2_K", "IQ3_K", "IQ4_K", "IQ5_K", "IQ6_K", "IQ2_TN"),
    *("IQ1_TN", "IQ4_KS", "IQ2_KS", "IQ4_KSS", "Q8_K16", "Q8_K32", "Q8_KR8", "Q8_K128", "Q8_KV"),
    *("IQ5_KS", "IQ2_KT", "IQ3_KT", "IQ4_KT", "IQ3_KS", "IQ2_KL", "IQ1_KT"),
)


def type_name(number: int) -> str:
    """What ggml or ik_llama.cpp calls a type, the number itself for one that neither has."""
    from gguf import GGMLQuantizationType

    ggml = {int(kind): kind.name for kind in GGMLQuantizationType}
    of_ik = dict(enumerate(_OF_IK, 133))
    if number in ggml:
        return ggml[number]
    if number in of_ik:
        return f"{of_ik[number]} of ik_llama.cpp"
    plain = (ggml | of_ik).get(number - 200)
    return str(number) if plain is None else f"{plain} as ik_llama.cpp interleaves it"


def dequantize(blocks: GgufBlocks) -> "torch.Tensor":
    """(N, K) float32, by the gguf package, which defines the formats."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[blocks.type]
    values = torch.empty(blocks.shape, dtype=torch.float32, device="cpu")
    step = max(1, _CHUNK_WEIGHTS // blocks.shape[1])
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and Inf are for the caller to judge
        for start in range(0, len(values), step):
            part = quants.dequantize(blocks.data[start : start + step].numpy(), kind)
            values[start : start + step] = torch.from_numpy(part)
    return values
