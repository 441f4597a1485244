"""What qlora learnt: into the weights, or as a directory of peft's beside the 4-bit base."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from engine.architecture.config import ModelConfig
from engine.architecture.families import layer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.adapter import CONFIG, LINEAGE, PREFIX, WEIGHTS, AdaptedCheckpoint, Pair
from engine.checkpoint.safetensors import save_tensors
from engine.checkpoint.weights import lineage_hash
from engine.healing.settings import Settings
from engine.scratch import Scratch, check_new, partial_of, write_text

BASE = "base"  # in the directory of an adapter


def merged(
    checkpoint: Checkpoint, config: ModelConfig, pairs: Mapping[str, Pair]
) -> AdaptedCheckpoint:
    """`checkpoint`, whose layers `config` keeps, with W + B A for each pair of the pruned model."""
    names = {}
    for slot, entry in enumerate(config.layers):
        originals = layer_tensors(config, entry.layer)
        for role, (name, _) in layer_tensors(config, slot).items():
            names[name.removesuffix(".weight")] = originals[role][0].removesuffix(".weight")
    return AdaptedCheckpoint(checkpoint, {names[m]: pair for m, pair in pairs.items()}, 1.0)


def write(
    adapted: AdaptedCheckpoint, settings: Settings, out: Path, *, beside: dict[str, str]
) -> None:
    """The new directory `out`: the adapter as peft reads it, its base, a packed directory that is
    moved there, and the text files `beside` by name."""
    check_new(out)
    base = adapted.base
    partial = Scratch(partial_of(out), str(base.path.resolve()))
    tensors = {}
    for module, pair in adapted.pairs.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.contiguous()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b.contiguous()
    metadata = {"format": "pt", LINEAGE: lineage_hash(base, base.config)}
    save_tensors(partial.path / WEIGHTS, tensors, metadata)
    said = described(settings, sorted({name.rpartition(".")[2] for name in adapted.pairs}))
    for name, text in (beside | {CONFIG: json.dumps(said, indent=2) + "\n"}).items():
        write_text(partial.path / name, text)
    os.rename(base.path, partial.path / BASE)
    partial.become(out)


def described(settings: Settings, targets: list[str]) -> dict:
    """adapter_config.json: what peft cannot do without, and what differs from its defaults."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": BASE,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.rank,
        "lora_dropout": settings.dropout,
        "target_modules": targets,
        "bias": "none",
    }
