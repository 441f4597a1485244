"""transformers' model around 4-bit matrices, which come from their files as they lie there."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from engine.architecture.config import ModelConfig
from engine.architecture.families import outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import packed_form
from engine.errors import InputError
from engine.export import directory
from engine.export.tensors import all_stored_tensors
from engine.kernels.w4.format import Packed

Linear = Callable[[str, Packed, nn.Parameter | None], Any]  # (name, W, bias)
Embedding = Callable[[Any, float], nn.Module]  # (the linear of its matrix, factor)
Tensor = Packed | torch.Tensor


def assemble(
    checkpoint: Checkpoint,
    config: ModelConfig,
    linear: Linear,
    embedding: Embedding,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """The layers that `config` keeps; what is not quantized is a parameter of `dtype`.

    `linear` makes the module of a quantized matrix, which is named as in the model, without
    ".weight"; `embedding` makes that of a quantized embedding, whose linear a tied head is.
    """
    if any(rope.kind == "divisors" for rope in config.ropes):
        raise InputError(
            f"{checkpoint.path}: its rotary frequencies follow no rule that transformers, which "
            "trains it, has a name for"
        )
    model = _skeleton(config, dtype)
    tensors = dict(_tensors(checkpoint, config))
    for name, stored in tensors.items():
        if isinstance(stored, torch.Tensor):
            module, _, kind = name.rpartition(".")
            parameter = nn.Parameter(stored.to(dtype, copy=True))  # a mapped file stays unwritten
            setattr(model.get_submodule(module), kind, parameter)
    for name, stored in tensors.items():
        if isinstance(stored, Packed):
            module = name.removesuffix(".weight")
            old = model.get_submodule(module)
            made = linear(module, stored, getattr(old, "bias", None))
            if isinstance(old, nn.Embedding):
                if config.tied:
                    model.set_submodule("lm_head", made)
                made = embedding(made, float(getattr(old, "embed_scale", 1.0)))
            model.set_submodule(module, made)
    if config.tied and isinstance(tensors[outer_tensors(config)["embedding"][0]], torch.Tensor):
        model.lm_head.weight = model.get_input_embeddings().weight
    return model.eval()


def _skeleton(config: ModelConfig, dtype: torch.dtype) -> Any:
    """Without memory for its parameters; its buffers are there."""
    try:
        from accelerate import init_empty_weights
    except ImportError:
        raise InputError(
            "training a 4-bit model needs accelerate: pip install 'accelerate>=1.4'"
        ) from None
    from transformers import AutoConfig, AutoModelForCausalLM

    described = directory.sliced_config(config)
    kind = described.pop("model_type")
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **described), dtype=dtype
        )


def _tensors(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """By the names of the model, layers by slot."""
    for item, stored in all_stored_tensors(checkpoint, config):
        yield item.name, packed_form(stored, f"{checkpoint.path}: {item.source}")
