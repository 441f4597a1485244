"""Random GGUF blocks for format and kernel tests."""

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

HALVES = {  # byte offsets of the float16 fields of a block
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "IQ4_NL": [0],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208],
}  # fmt: skip


def _bytes(rng: torch.Generator, name: str, n: int, k: int) -> torch.Tensor:
    weights, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return torch.randint(0, 256, (n, k // weights, nbytes), generator=rng, dtype=torch.uint8)


def random_blocks(rng: torch.Generator, name: str, n: int, k: int) -> torch.Tensor:
    """(n, bytes) of any bytes, but for float16 fields: any finite value, subnormals and -0 too."""
    data = _bytes(rng, name, n, k)
    for offset in HALVES[name]:
        high = data[..., offset + 1]
        high[(high & 0x7C) == 0x7C] &= 0x83  # Inf and NaN
    return data.reshape(n, -1)


def mild_blocks(rng: torch.Generator, name: str, n: int, k: int) -> torch.Tensor:
    """The same with float16 fields of either sign near one, so that a row's blocks count alike."""
    data = _bytes(rng, name, n, k)
    for offset in HALVES[name]:
        field = (0.5 + torch.rand(data.shape[:2], generator=rng)) * (
            1 - 2 * torch.randint(2, data.shape[:2], generator=rng)
        )
        data[..., offset : offset + 2] = field.half().view(torch.uint8).view(*data.shape[:2], 2)
    return data.reshape(n, -1)


def scaled_blocks(rng: torch.Generator, name: str, n: int, k: int, rms: float) -> torch.Tensor:
    """`mild_blocks` of weights of that RMS."""
    data = mild_blocks(rng, name, n, k)
    values = torch.from_numpy(quants.dequantize(data.numpy(), GGMLQuantizationType[name]))
    factor = rms / values.square().mean().sqrt()
    blocks = data.view(n, -1, GGML_QUANT_SIZES[GGMLQuantizationType[name]][1])
    for offset in HALVES[name]:
        field = blocks[..., offset : offset + 2].contiguous().view(torch.float16) * factor
        blocks[..., offset : offset + 2] = field.half().view(torch.uint8)
    return data
