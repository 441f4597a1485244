"""transformers opens packed directories: `import engine.hf`, then `from_pretrained(directory)`.

A quantizer registered through transformers' own interface puts a `W4Linear` where the directory
has a packed matrix. On a CPU a model in float32 computes exactly, in 16 bits kernels round what
they multiply to 8 bits; on a GPU it has 16 bits. Gradients flow through the packed weights to what
stands before them, so that adapters learn on top: `adapt` tells peft of `W4Linear`.
"""

from collections.abc import Iterator
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from engine.architecture.families import FAMILIES, layer_parts
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.safetensors import SafetensorsCheckpoint
from engine.checkpoint.weights import packed_form
from engine.errors import InputError
from engine.export.tensors import Item, all_stored_tensors
from engine.kernels.w4 import store
from engine.kernels.w4.embedding import W4Embedding
from engine.kernels.w4.format import Packed, rows_of
from engine.kernels.w4.linear import W4Linear
from engine.kernels.w4.lora import adapt

__all__ = ["ShallowConfig", "ShallowQuantizer", "W4Embedding", "adapt"]

_PARTS = rf"\.weight\.({'|'.join(store.PARTS)})$"


class _Awaited(nn.Module):
    """Stands where a packed matrix will be; its bias is loaded as any other parameter."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.bias = getattr(linear, "bias", None)
        self.scale = float(getattr(linear, "scalar_embed_scale", 1.0))


@register_quantization_config(store.METHOD)
class ShallowConfig(QuantizationConfigMixin):
    """What a packed directory's config.json says of quantization, in the present version."""

    def __init__(self, **said: Any) -> None:
        self.__dict__.update(said | {"version": store.VERSION})
        self.quant_method: Any = store.METHOD  # transformers' own are of an enumeration

    def to_dict(self) -> dict[str, Any]:
        return deepcopy(self.__dict__)


@register_quantizer(store.METHOD)
class ShallowQuantizer(HfQuantizer):
    """Reads the packed matrices itself; transformers loads what is left."""

    requires_calibration = True
    directory: Path

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return open_checkpoint(self.directory)

    def __getstate__(self) -> dict[str, Any]:
        """Without the files that a copy opens again."""
        return {name: value for name, value in self.__dict__.items() if name != "checkpoint"}

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        (self.directory,) = {Path(file).parent for file in kwargs["checkpoint_files"]}
        for item, _ in _packed(self.checkpoint):
            try:
                module = model.get_submodule(item.module)
            except AttributeError:
                raise InputError(
                    f"{self.directory}: opens as a causal language model (AutoModelForCausalLM), "
                    f"found {type(model).__name__}, which has no {item.module}"
                ) from None
            model.set_submodule(item.module, _Awaited(module))
            if item.role in ("embedding", "head"):  # two modules around one matrix
                model.all_tied_weights_keys = model._tied_weights_keys = {}
        if self.checkpoint.config.tied and not model.all_tied_weights_keys:
            model.set_submodule("lm_head", _Awaited(model.get_submodule("lm_head")))
        ignored = model._keys_to_ignore_on_load_unexpected or set()
        model._keys_to_ignore_on_load_unexpected = {*ignored, _PARTS}
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        exact, tied = model.dtype == torch.float32, self.checkpoint.config.tied
        if exact and model.device.type == "cuda":
            raise InputError(
                f"{self.directory}: packed matrices on a GPU meet bfloat16 or float16, found "
                "float32; ask from_pretrained for dtype=torch.bfloat16"
            )
        for item, stored in _packed(self.checkpoint):
            waiting, packed = model.get_submodule(item.module), stored.to(model.device)
            place = item.module
            if item.role == "embedding":
                embedding = W4Embedding(packed, waiting.scale, model.dtype)
                model.set_submodule(place, embedding)
                if not tied:
                    continue
                place = "lm_head"  # the same matrix; a bias is the head's alone
            bias = model.get_submodule(place).bias
            model.set_submodule(place, W4Linear.from_packed(packed, bias, exact=exact))
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict]:
        """What a packed directory holds, fused matrices by part."""
        named = model.state_dict().items()
        state = {name: tensor for name, tensor in named if ".weight." not in name}
        for name, packed in self._matrices(model):
            for part, tensor in store.to_tensors(name, packed).items():
                state[part] = tensor.clone(memory_format=torch.contiguous_format)
        return state, dict(SafetensorsCheckpoint(self.checkpoint.path).metadata)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def _matrices(self, model: Any) -> Iterator[tuple[str, Packed]]:
        """(name in a packed directory, matrix) of all that the model holds packed."""
        config = self.checkpoint.config
        fused = FAMILIES[config.family].fused
        for item, _ in _packed(self.checkpoint):
            module = model.get_submodule(item.module)
            packed = module.packed
            if item.slot is None or item.role not in fused:
                yield item.name, packed
                continue
            parts = layer_parts(config, item.slot)
            for role in fused[item.role]:
                first = parts[role].first
                yield parts[role].name, rows_of(packed, first, first + parts[role].shape[0])


def _packed(checkpoint: Checkpoint) -> Iterator[tuple[Item, Packed]]:
    """Every packed matrix under its family's name."""
    for item, stored in all_stored_tensors(checkpoint, checkpoint.config):
        matrix = packed_form(stored, item.source)
        if isinstance(matrix, Packed):
            yield item, matrix
