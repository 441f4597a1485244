"""From a checkpoint to a packed directory, a layer in memory at a time.

GPTQ carries hidden states along: what the quantized layers give is what the next one is calibrated
on. A finished layer is a file; a run that was killed goes on behind the last one.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import layer_parts
from engine.artifacts import Plan
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import Observed, Weights, layer_weights, lineage_hash, values
from engine.errors import InputError
from engine.export import directory
from engine.export.packed import (
    PLAN,
    Entry,
    cut_plan,
    is_packed,
    read_shard,
    summary,
    write_shard,
)
from engine.quantize.recipe import Recipe, pack_layer, pack_outer
from engine.reference.stream import (
    DEFAULT_LIMIT_BYTES,
    HiddenStates,
    open_states,
    pad_batches,
    step,
)
from engine.text.samples import hash_samples

_SHARED = {"k": "q", "v": "q", "gate": "up"}  # matrices that read another's input


def pack(
    checkpoint: Checkpoint,
    config: ModelConfig,
    out: Path,
    recipe: Recipe,
    samples: Sequence[Sequence[int]] = (),
    *,
    plan: Plan | None = None,
    batch_tokens: int = 2048,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Entry]:
    """Writes the layers that `config` keeps to the new directory `out`; says what became of what.

    `samples` are token ids that gptq is calibrated on. `plan` is stored beside. Norms and biases
    stay as they are; so does an embedding of its own, in 16 bits where it was wider. `progress` is
    called with files done and in all. InputError names what cannot be quantized.
    """
    out, recipe = Path(out), recipe.of(config)
    quantization = recipe.to_json()
    if recipe.method == "gptq":
        quantization["calibration"] = _calibration(config, samples)
    described = directory.sliced_config(config) | {"quantization_config": quantization}
    partial = directory.begin(out, checkpoint.path, config, described)
    if plan is not None:
        plan.save(partial / PLAN)
    count = len(config.layers) + 1
    files = [partial / directory.shard_name(index, count) for index in range(count)]
    states, batches = None, list(pad_batches(samples, batch_tokens, config))
    work = partial / "work"
    if recipe.method == "gptq" and not all(file.exists() for file in files[:-1]):
        work.mkdir(exist_ok=True)
        states = open_states(checkpoint, config, batches, limit_bytes=limit_bytes, directory=work)
    layers = _pack_layers(checkpoint, config, recipe, states, batches, files[:-1])
    for done, _ in enumerate(layers, 1):
        if progress is not None:
            progress(done, count)
    if not files[-1].exists():
        write_shard(files[-1], *pack_outer(checkpoint, config, recipe))
    entries = summary(files)
    directory.index_shards(partial, [file.name for file in files])
    shutil.rmtree(work, ignore_errors=True)
    directory.finish(partial, out)
    return entries


def plan_of(
    checkpoint: Checkpoint, config: ModelConfig, model: str, given: Plan | None = None
) -> Plan | None:
    """Which of the original's layers the directory will hold; None where it holds them all.

    A packed directory that was cut itself brings its plan along, and the numbers in it.
    """
    kept = tuple(entry.layer for entry in config.layers)
    earlier = checkpoint.path / PLAN
    if is_packed(config) and earlier.is_file():
        return cut_plan(earlier, config)
    if given is not None or len(kept) == config.total_layers:
        return given
    return Plan(
        model=model,
        architecture=config.architecture_hash,
        lineage=lineage_hash(checkpoint, config),
        total_layers=config.total_layers,
        keep=kept,
        rule="manual",
        score=None,
        protect=(),
        profile=None,
        text_hash=None,
        note="",
    )


@torch.no_grad()
def hessians(
    config: ModelConfig,
    slot: int,
    weights: Weights,
    states: HiddenStates,
    batches: Sequence[torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Matrix role -> sum of x x' (K, K) float32 over its inputs x at every token but padding."""
    shared = _SHARED | ({"up": "q", "gate": "q"} if config.parallel else {})
    sums: dict[str, torch.Tensor] = {}
    for index, tokens in enumerate(batches):
        real = tokens >= 0

        def observe(role: str, x: torch.Tensor, real: torch.Tensor = real) -> None:
            if role not in shared:
                rows = x[real]
                total = sums.setdefault(role, rows.new_zeros(rows.shape[1], rows.shape[1]))
                total.addmm_(rows.T, rows)

        step(config, slot, Observed(weights, observe), states[index], tokens)
    return sums | {role: sums[other] for role, other in shared.items() if role in weights}


def _pack_layers(
    checkpoint: Checkpoint,
    config: ModelConfig,
    recipe: Recipe,
    states: HiddenStates | None,
    batches: Sequence[torch.Tensor],
    files: Sequence[Path],
) -> Iterator[None]:
    """One file a layer, unless it is there; yields behind each."""
    for slot, file in enumerate(files):
        if not file.exists():
            stored = dict(layer_weights(checkpoint, config, config.layers[slot].layer))
            sums = {}
            if states is not None:
                if states.slot != slot:
                    raise InputError(f"{file}: is missing; remove {file.parent} to start over")
                weights = {role: values(matrix) for role, matrix in stored.items()}
                sums = hessians(config, slot, weights, states, batches)
            write_shard(file, *pack_layer(checkpoint.path, config, slot, recipe, stored, sums))
        if states is not None and states.slot == slot < len(files) - 1:
            _advance(config, slot, read_shard(file), states, batches)
        yield


@torch.no_grad()
def _advance(
    config: ModelConfig,
    slot: int,
    packed: dict[str, Any],
    states: HiddenStates,
    batches: Sequence[torch.Tensor],
) -> None:
    """Takes the hidden states through the layer as it was quantized."""
    parts = layer_parts(config, slot)
    weights = {role: values(packed[part.name]) for role, part in parts.items()}
    for index, tokens in enumerate(batches):
        states.put(index, step(config, slot, weights, states[index], tokens))
    states.advance()


def _calibration(config: ModelConfig, samples: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What identifies the samples; InputError where they are none or longer than the context."""
    if not any(map(len, samples)):
        raise InputError("gptq: expected calibration samples, found none")
    return {
        "samples": len(samples),
        "tokens": sum(map(len, samples)),
        "text_hash": hash_samples(samples, config.max_context),
    }
