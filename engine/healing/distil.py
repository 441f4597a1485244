"""Distillation: the pruned model learns to predict what the whole one does."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from engine.healing import state
from engine.healing.data import Data, perplexity
from engine.healing.settings import Settings
from engine.healing.streams import Streams, relative_error
from engine.healing.student import Student
from engine.healing.teacher import divergence
from engine.progress import Report

Taught = Callable[[int], tuple[torch.Tensor, torch.Tensor]]  # window -> log-probabilities, indices

LOGITS = 1 << 27  # values; half a gigabyte of float32
FIRST_SHARE = 0.1  # of the rate, at least: a warm-up by the clock would begin at nothing


def distil(
    student: Student,
    taught: Taught,
    data: Data,
    settings: Settings,
    directory: Path,
    report: Report | None = None,
    keep_last: bool = False,
    streams: Streams | None = None,
) -> state.Standing:
    """Trains `student` and leaves it with the weights of its best check, or of the last.

    It learns what `taught` says, and the teacher's `streams`, weighed by `settings.residual`.
    `directory` holds what a killed run is taken up from, to the same bits where `steps` end it.
    """
    training = Training(student, taught, data, settings, directory, streams)
    standing = training.standing
    if not standing.checks:
        training.check()
    earlier, first, begun = standing.seconds, standing.step, time.monotonic()
    while not standing.stopped:
        training.step()
        standing.seconds = earlier + time.monotonic() - begun
        if standing.stopped:  # the last good weights have been saved
            break
        standing.stopped = why_stop(standing, settings)
        if standing.stopped or standing.step % settings.check_every == 0:
            training.check()
            standing.seconds = earlier + time.monotonic() - begun
        if report is not None:
            tokens = (standing.step - first) * settings.batch * settings.window
            spent = standing.seconds - earlier
            said = f"loss {standing.losses[-1]:.4f}, {tokens / spent:.0f} tokens/s"
            report(*extent(standing, settings), said)
    if not keep_last:
        student.take(state.load_weights(training.best, student.learning))
    return standing


def unit(settings: Settings) -> str:
    """What `extent` counts."""
    return "seconds" if settings.steps is None else "steps"


def extent(standing: state.Standing, settings: Settings) -> tuple[int, int]:
    """(steps done, in all), or seconds where only the minutes are limited."""
    if settings.steps is not None:
        return standing.step, settings.steps
    total = 60 * (settings.minutes or 0)
    return round(min(standing.seconds, total)), round(total)


def share(standing: state.Standing, settings: Settings) -> float:
    """How much of the run is over, 0 .. 1, in the middle of the step that comes."""
    parts = []
    if settings.steps is not None:
        parts.append((standing.step + 0.5) / settings.steps)
    if settings.minutes is not None:
        half = standing.seconds / max(1, standing.step) / 2
        parts.append((standing.seconds + half) / (60 * settings.minutes))
    return min(1.0, max(parts))


def rate(at: float, settings: Settings) -> float:
    """The learning rate at this share of the run: a rise, then a cosine down to nothing."""
    if at < settings.warm_up:
        return settings.lr * max(at / settings.warm_up, FIRST_SHARE)
    fall = (at - settings.warm_up) / (1 - settings.warm_up)
    return settings.lr * (1 + math.cos(math.pi * fall)) / 2


def why_stop(standing: state.Standing, settings: Settings) -> str:
    """Empty while there is more to do."""
    if settings.steps is not None and standing.step >= settings.steps:
        return f"after {standing.step} steps"
    if settings.minutes is not None and standing.seconds >= 60 * settings.minutes:
        return f"after {settings.minutes:g} minutes"
    return ""


class Training:
    """The student, its optimiser and where they stand."""

    def __init__(
        self,
        student: Student,
        taught: Taught,
        data: Data,
        settings: Settings,
        directory: Path,
        streams: Streams | None = None,
    ) -> None:
        self.student, self.taught, self.data, self.settings = student, taught, data, settings
        self.streams = streams
        self.file, self.best = directory / "training.safetensors", directory / "best.safetensors"
        weights = list(student.learning.values())
        self.optimiser = torch.optim.AdamW(weights, lr=settings.lr, weight_decay=0.0, fused=True)
        self.standing = state.restore(self.file, student.learning, self.optimiser)
        student.refresh()

    def step(self) -> None:
        """One update, or `stopped` with the reason, the weights as they were."""
        standing, settings = self.standing, self.settings
        self.optimiser.zero_grad(set_to_none=True)
        windows = self.data.batch(standing.step, settings.batch, settings.seed)
        taken = range(0, len(windows), self.together)
        parts = [windows[start : start + self.together] for start in taken]
        loss = sum(self._learn(part, len(windows)) for part in parts)
        self.student.collect()
        weights = self.student.learning.values()
        norm = float(torch.nn.utils.clip_grad_norm_(weights, settings.clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            standing.stopped = f"the loss is not finite at step {standing.step + 1}"
            return
        for group in self.optimiser.param_groups:
            group["lr"] = rate(share(standing, settings), settings)
        self.optimiser.step()
        self.student.refresh()
        standing.step += 1
        standing.losses.append(loss)

    @property
    def together(self) -> int:
        """Windows whose logits are in memory at a time."""
        return max(1, LOGITS // (self.settings.window * self.student.vocab_size))

    def _learn(self, windows: list[int], count: int) -> float:
        """Adds the gradient of some of `count` windows; their part of the loss."""
        taught = [self.taught(window) for window in windows]
        logits = self.student.logits(self.data.windows[windows])
        expected, indices = (
            torch.stack(each).to(logits.device) for each in zip(*taught, strict=True)
        )
        loss = divergence(logits, expected, indices)
        if self.streams is not None:
            found = torch.stack(self.student.streams, 1)
            wanted = torch.stack([self.streams(window) for window in windows]).to(found.device)
            loss = loss + self.settings.residual * relative_error(found, wanted)
        loss = loss * (len(windows) / count)
        loss.backward()
        return float(loss.detach())

    def check(self) -> None:
        """Held-out perplexity; keeps the weights where it is the best so far, and saves all."""
        standing, learning = self.standing, self.student.learning
        found = perplexity(self.student.logits, self.data.held_out)
        standing.checked(found)
        standing.missed += 1
        if found < standing.best or not self.best.is_file():
            standing.best, standing.best_step, standing.missed = found, standing.step, 0
            state.save(self.best, standing, learning)
        if standing.missed >= self.settings.patience and not standing.stopped:
            standing.stopped = f"at step {standing.step}, no better for {standing.missed} checks"
        state.save(self.file, standing, learning, self.optimiser)
