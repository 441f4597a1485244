"""What the whole model says: its likeliest tokens at every position, kept on disk, and the loss.

Of a position's logits the k largest stay, as log-probabilities in float16, and with them the log
of the mass of all others, so that k + 1 bins hold the whole distribution.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engine.reference.stream import marked

Logits = Callable[[torch.Tensor], torch.Tensor]  # tokens (1, W) -> (1, W, V) float32


def bins(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (..., k + 1): of the tokens `indices` (..., k), and of all others together.

    The others are summed without the chosen ones: 1 minus their mass would be lost in rounding.
    """
    chosen = logits.gather(-1, indices)
    rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat((chosen, rest), dim=-1).log_softmax(-1)


class Divergence(torch.autograd.Function):
    """Mean KL(teacher || student) over positions, of the k + 1 bins of both.

    (logits (..., V) of the student, log-probabilities (..., k + 1) and `indices` (..., k) of the
    teacher) -> a scalar. Derived by hand because V is tens of thousands: with p the student's and
    t the teacher's mass of a bin, a chosen token's gradient is p - t, and the rest share that of
    the last bin as they share its mass. Two passes over the logits instead of a dozen.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor
    ) -> torch.Tensor:
        others = logits.to(torch.float32, copy=True)
        chosen = others.gather(-1, indices)
        others.scatter_(-1, indices, -torch.inf)
        rest = others.logsumexp(-1, keepdim=True)
        student = torch.cat((chosen, rest), dim=-1).log_softmax(-1)
        ctx.save_for_backward(others, rest, student, teacher, indices)
        ctx.dtype = logits.dtype
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        others, rest, student, teacher, indices = ctx.saved_tensors
        bins = (student.exp() - teacher.exp()) * (gradients[0] / student[..., 0].numel())
        found = (others - rest).exp_().mul_(bins[..., -1:])
        return found.scatter_(-1, indices, bins[..., :-1]).to(ctx.dtype), None, None


def divergence(logits: torch.Tensor, teacher: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """A scalar: see `Divergence`."""
    found: torch.Tensor = Divergence.apply(logits, teacher, indices)
    return found


class Teacher:
    """The teacher's bins for windows (N, W), each computed where it is first asked for.

    The files are sparse and mapped; a window is marked when it is whole, so that a killed run
    finds what it had. `name` tells texts and teachers apart.
    """

    def __init__(
        self, windows: torch.Tensor, top: int, vocab_size: int, directory: Path, name: str
    ) -> None:
        self.windows, self.top = windows, min(top, vocab_size - 1)
        directory.mkdir(parents=True, exist_ok=True)
        count, width = windows.shape
        # By width, too: the same text may be cut into windows of another length.
        digest = hashlib.sha256(f"{name} {width} {self.top}".encode()).hexdigest()[:16]
        self.values, self.indices, self.done = marked(
            directory / f"teacher-{digest}",
            count,
            values=(torch.float16, (count, width, self.top + 1)),
            indices=(torch.int32, (count, width, self.top)),
        )

    @torch.no_grad()
    def __call__(self, window: int, logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities (W, k + 1) float32, indices (W, k) int64) of a window."""
        if not self.done[window]:
            found = logits(self.windows[window : window + 1])[0].float().cpu()
            indices = found.topk(self.top, dim=-1).indices
            self.indices[window] = indices
            self.values[window] = bins(found, indices)
            self.done[window] = 1
        return self.values[window].float().log_softmax(-1), self.indices[window].long()
