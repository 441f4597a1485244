"""Tiny models, packed by our own rules, on their way to other formats."""

from pathlib import Path

import torch
from support import tiny

from engine.checkpoint import Checkpoint, open_checkpoint
from engine.kernels.w4.format import Packed
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime.reference import ReferenceRuntime

# Sizes that every format's blocks divide; rotary settings of 4 frequencies keep their head.
WIDE = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 6}


def packed_model(
    source: Checkpoint, out: Path, rng: torch.Generator, drop: tuple[int, ...] = (), **recipe
) -> Checkpoint:
    """The model rounded by a Recipe, its embedding and head in 16 bits unless told."""
    recipe = Recipe(**({"method": "rtn", "group": 32, "head": 16} | recipe))
    kept = [layer for layer in range(source.config.total_layers) if layer not in drop]
    samples = torch.randint(3, tiny.VOCAB, (4, 24), generator=rng).tolist()
    pack(source, source.config.keep(kept), out, recipe, samples)
    return open_checkpoint(out)


@torch.no_grad()
def logits(checkpoint: Checkpoint, ids: torch.Tensor, config=None) -> torch.Tensor:
    """By the reference, of every token of ids (B, T)."""
    runtime = ReferenceRuntime.load(checkpoint, config or checkpoint.config)
    return runtime.forward(ids, runtime.new_cache(len(ids)), logits="all")


def assert_same_matrices(ours: Checkpoint, theirs: Checkpoint) -> None:
    """Equal codes, scales and plain values, tensor by tensor, whatever parts are stored fused."""
    from engine.checkpoint.weights import layer_weights, outer_weights, packed_form

    def every(checkpoint: Checkpoint):
        yield from outer_weights(checkpoint, checkpoint.config)
        for entry in checkpoint.config.layers:
            yield from layer_weights(checkpoint, checkpoint.config, entry.layer)

    for (role, mine), (_, other) in zip(every(ours), every(theirs), strict=True):
        mine, other = packed_form(mine, role), packed_form(other, role)
        if isinstance(mine, torch.Tensor):
            assert torch.equal(mine.float(), other.float()), role
            continue
        assert isinstance(other, Packed) and mine.spec == other.spec, role
        parts = other.tensors()
        assert mine.tensors().keys() == parts.keys(), role
        assert all(torch.equal(t, parts[name]) for name, t in mine.tensors().items()), role


def write_awq(ours: Checkpoint, out: Path) -> None:
    """A packed checkpoint of scheme "zero" as AutoAWQ's "gemm" lays it out."""
    import json
    import shutil

    from safetensors.torch import save_file
    from support.quantized import into_words

    from engine.kernels.w4.format import unpack_codes

    order, tensors = [0, 4, 1, 5, 2, 6, 3, 7], {}
    for name in ours.names():
        packed, module = ours.packed(name), name.removesuffix(".weight")
        if packed is None:
            tensors[name] = ours.read(name).contiguous().clone()
            continue
        tensors[f"{module}.qweight"] = into_words(unpack_codes(packed).T, 4, order).contiguous()
        tensors[f"{module}.qzeros"] = into_words(packed.zeros.T, 4, order).contiguous()
        tensors[f"{module}.scales"] = packed.scales.T.contiguous()
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    config = json.loads((ours.path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["lm_head", "model.layers.1.mlp"],
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    for file in ours.path.glob("tokenizer*"):
        shutil.copy(file, out)
