"""Where a training stands, in one safetensors file: a kill at any moment leaves a whole one.

There is no random state in it: the order of the text is drawn from the seed and the step alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from engine.checkpoint.safetensors import SafetensorsFile, save_tensors

KEY = "standing"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Standing:
    """Of a training: what is done, and how it went."""

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # one a step
    checks: list[float] = field(default_factory=list)  # held-out perplexity
    best_step: int = 0
    best: float = float("inf")
    missed: int = 0  # checks since the best
    stopped: str = ""  # why, once it has


def joined(one: Standing, two: Standing) -> Standing:
    """Of a training and the one that went on from its best weights."""
    if not one.stopped:
        return two
    return Standing(
        step=one.step + two.step,
        seconds=one.seconds + two.seconds,
        losses=one.losses + two.losses,
        checks=one.checks + two.checks,
        best_step=one.step + two.best_step if two.best_step else one.best_step,
        best=two.best,
        stopped=f"{one.stopped}, then {two.stopped}",
    )


def save(
    path: Path,
    standing: Standing,
    weights: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None = None,
) -> None:
    """`weights` by name, with the optimiser's moments where it is given."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    if optimiser is not None:
        for name, weight in weights.items():
            held = optimiser.state.get(weight, {})
            tensors |= {f"{kind}.{name}": held[kind] for kind in MOMENTS if kind in held}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_tensors(path, tensors, {KEY: json.dumps(asdict(standing))})


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    file = SafetensorsFile(path)
    names = [name for name in file.entries if name.startswith("weight.")]
    return {name.removeprefix("weight."): file.read(name) for name in names}


def standing(path: Path) -> Standing:
    """What `save` wrote of it; a fresh one where there is nothing."""
    if not path.is_file():
        return Standing()
    return Standing(**json.loads(SafetensorsFile(path).metadata[KEY]))


def restore(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None = None,
) -> Standing:
    """Puts back what `save` wrote; a fresh standing where there is nothing."""
    found = standing(path)
    if not path.is_file():
        return found
    file = SafetensorsFile(path)
    for name, weight in weights.items():
        with torch.no_grad():
            weight.copy_(file.read(f"weight.{name}"))
        if optimiser is not None and f"{MOMENTS[0]}.{name}" in file.entries:
            moments = {k: file.read(f"{k}.{name}").clone().to(weight.device) for k in MOMENTS}
            # Fused AdamW wants the step where the weight is.
            step = torch.tensor(float(found.step), device=weight.device)
            optimiser.state[weight] = {"step": step} | moments
    return found
