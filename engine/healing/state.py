"""Where a training stands, in one safetensors file: a kill at any moment leaves a whole one.

There is no random state in it: the order of the text is drawn from the seed and the step alone.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from engine.artifacts import built
from engine.checkpoint.safetensors import SafetensorsFile, save_tensors
from engine.errors import InputError

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
    check_steps: tuple[int, ...] = ()  # of `checks`; files of earlier versions lack them

    def checked(self, found: float) -> None:
        self.checks.append(found)
        self.check_steps += (self.step,)


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
        check_steps=one.check_steps + tuple(one.step + step for step in two.check_steps),
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


def load_weights(path: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Those of `save` by the names, and of the shapes and dtypes, of `like`."""
    file = SafetensorsFile(path)
    return {name: _read(file, f"weight.{name}", weight) for name, weight in like.items()}


def standing(path: Path) -> Standing:
    """What `save` wrote of it; a fresh one where there is nothing."""
    if not path.is_file():
        return Standing()
    metadata = SafetensorsFile(path).metadata
    try:
        found: Standing = built(Standing, json.loads(metadata[KEY]), KEY)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    return found


def restore(
    path: Path,
    weights: Mapping[str, torch.Tensor],
    optimiser: torch.optim.Optimizer | None = None,
) -> Standing:
    """Puts back what `save` wrote; a fresh standing where there is nothing."""
    found = standing(path)
    if not path.is_file():
        return found
    file, held = SafetensorsFile(path), load_weights(path, weights)
    for name, weight in weights.items():
        with torch.no_grad():
            weight.copy_(held[name])
        if optimiser is not None and f"{MOMENTS[0]}.{name}" in file.entries:
            moments = {k: _read(file, f"{k}.{name}", weight).clone() for k in MOMENTS}
            moments = {k: moment.to(weight.device) for k, moment in moments.items()}
            # Fused AdamW wants the step where the weight is.
            step = torch.tensor(float(found.step), device=weight.device)
            optimiser.state[weight] = {"step": step} | moments
    return found


def _read(file: SafetensorsFile, name: str, like: torch.Tensor) -> torch.Tensor:
    found = file.read(name) if name in file.entries else None
    if found is None or (found.shape, found.dtype) != (like.shape, like.dtype):
        said = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
        expected = f"expected {tuple(like.shape)} {like.dtype}, found {said}"
        raise _damaged(file.path, f"tensor {name!r}: {expected}")
    return found


def _damaged(path: Path, why: str) -> InputError:
    return InputError(
        f"{path}: is not as this training left it ({why}); remove {path.parent} to start over"
    )
