"""GPTQ directories, version 1 and symmetric, as GPTQModel, transformers and vLLM read them.

`qweight` int32 (K * bits / 32, N), lowest bits first along K; `qzeros` int32 (G, N * bits / 32),
the zero point less one; `scales` float16 (G, N); `g_idx` int32 (K,), the group of each input.
"""

import json
from typing import Any

import torch

from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.weights import Stored, packed_form
from engine.export.quantized import QuantizedDirectory, as_half, require_scheme
from engine.export.tensors import Item, Unsupported
from engine.kernels.w4.format import Packed, Spec, pack_codes, unpack_codes


class Gptq(QuantizedDirectory):
    name = "gptq"
    ordered = False  # whether any matrix has the groups of its inputs in another order

    def require(self, item: Item, stored: Stored, spec: Spec) -> None:
        require_scheme(item, spec, "symmetric")  # version 1 underflows for a zero point of 0
        n, k = item.shape
        per_word = 32 // spec.bits
        if n % per_word or k % per_word:
            raise Unsupported(f"{item.source}: its shape {(n, k)} does not divide by {per_word}")
        if isinstance(stored, GgufBlocks):
            stored = packed_form(stored, item.source)
        assert isinstance(stored, Packed)  # as it has a spec
        if as_half(stored.scales) is None:
            raise Unsupported(f"{item.source}: its {spec.scale_dtype} scales are no float16")
        self.ordered = self.ordered or stored.perm is not None

    def quantization(self) -> dict[str, Any]:
        """Unsupported where not every matrix of a layer is quantized, and alike."""
        settings: dict[tuple[int, int], str] = {}
        for module, spec in self.specs.items():
            if spec is not None:
                settings.setdefault((spec.bits, spec.group), module)
            elif module != "lm_head":
                raise Unsupported(f"{module}.weight: is not quantized, as every layer's must be")
        if len(settings) > 1:
            found = [f"{bits} bits, group {group} ({settings[bits, group]})"
                     for bits, group in settings]  # fmt: skip
            raise Unsupported(f"all matrices must be quantized alike, found {' and '.join(found)}")
        ((bits, group),) = settings
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "bits": bits,
            "group_size": group or -1,
            "desc_act": self.ordered,
            "sym": True,
            "lm_head": self.specs.get("lm_head") is not None,
        }

    def beside(self) -> dict[str, str]:
        """Where older readers look."""
        return {"quantize_config.json": json.dumps(self.quantization(), indent=2)}

    def encode(self, packed: Packed) -> dict[str, torch.Tensor]:
        (n, k), bits = packed.shape, packed.spec.bits
        codes, g_idx = unpack_codes(packed), torch.arange(k, dtype=torch.int32) // packed.group
        if packed.perm is not None:
            back = packed.perm.argsort()
            codes, g_idx = codes[:, back], g_idx[back]
        half = as_half(packed.scales)
        assert half is not None  # it was looked at
        middle = (1 << bits - 1) - 1
        zeros = torch.full((packed.groups, n), middle, dtype=torch.uint8)
        return {
            "qweight": words(codes, bits).T,
            "qzeros": words(zeros, bits),
            "scales": half.T,
            "g_idx": g_idx,
        }


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """(R, C) uint8 -> (R, C * bits / 32) int32, the first code in the lowest bits."""
    packed = pack_codes(codes.contiguous(), bits)[:, : codes.shape[1] * bits // 8]
    return packed.contiguous().view(torch.int32)
