"""compressed-tensors directories, "pack-quantized": what vLLM, SGLang and transformers load.

Codes are signed, [-8, 7] in 4 bits, packed by the library: `weight_packed` int32 (N, K * bits /
32), `weight_scale` (N, G), `weight_shape` int64 (2,), and where asymmetric `weight_zero_point`
int32 (N * bits / 32, G), packed along N. The configuration is made by the library's own classes.
"""

import warnings
from typing import Any

import torch

from engine.checkpoint.weights import Stored
from engine.errors import InputError
from engine.export.quantized import QuantizedDirectory, require_scheme
from engine.export.tensors import Item, Unsupported
from engine.kernels.w4.format import Packed, Spec, unpack_codes

INSTALL = "compressed-tensors: needs its library: pip install 'compressed-tensors>=0.15'"


class CompressedTensors(QuantizedDirectory):
    name = "compressed-tensors"

    def require(self, item: Item, stored: Stored, spec: Spec) -> None:
        require_scheme(item, spec, "symmetric", "zero")
        if spec.group and item.shape[1] % spec.group:
            raise Unsupported(f"{item.source}: {item.shape[1]} inputs in groups of {spec.group}")
        if isinstance(stored, Packed) and stored.perm is not None:
            raise Unsupported(f"{item.source}: the library no longer has an activation order")

    def quantization(self) -> dict[str, Any]:
        """One group a setting; "Linear" stands for every module where there is one setting."""
        try:
            import compressed_tensors.compressors.pack_quantized.helpers  # noqa: F401  # of `encode`
            from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
        except ImportError:
            raise InputError(INSTALL) from None
        by_setting: dict[tuple[int, int, str], list[str]] = {}
        for module, spec in self.specs.items():
            if spec is not None:
                by_setting.setdefault((spec.bits, spec.group, spec.scheme), []).append(module)
        if not by_setting:
            raise Unsupported("none of its matrices is quantized, which `engine quantize` does")
        if any(scheme == "zero" for _, _, scheme in by_setting):
            warnings.warn(
                "transformers opens zero points with compressed-tensors 0.15 to 0.17 alone, whose "
                "later releases fail at their own files too; --scheme symmetric has none",
                stacklevel=2,
            )
        groups = {
            f"group_{index}": QuantizationScheme(
                targets=["Linear"] if len(by_setting) == 1 else modules,
                weights=_arguments(*setting),
            )
            for index, (setting, modules) in enumerate(by_setting.items())
        }
        plain = [module for module, spec in self.specs.items() if spec is None]
        config = QuantizationConfig(
            config_groups=groups,
            format="pack-quantized",
            quantization_status="compressed",
            ignore=plain if "lm_head" in self.specs else [*plain, "lm_head"],
        )
        return config.model_dump(mode="json")

    def encode(self, packed: Packed) -> dict[str, torch.Tensor]:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits = packed.spec.bits
        parts = {
            "weight_packed": pack_to_int32(_signed(unpack_codes(packed), bits), bits),
            "weight_scale": packed.scales,
            "weight_shape": torch.tensor(packed.shape),
        }
        if packed.zeros is not None:
            zeros = _signed(packed.zeros, bits)
            parts["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0)
        return parts


def _arguments(bits: int, group: int, scheme: str):
    from compressed_tensors.quantization import QuantizationArgs

    return QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=scheme == "symmetric",
        strategy="group" if group else "channel",
        group_size=group or None,
    )


def _signed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 -> int8, the middle code as 0."""
    return (codes.to(torch.int16) - (1 << bits - 1)).to(torch.int8)
