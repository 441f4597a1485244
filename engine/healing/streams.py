"""The residual stream at the end of every cut: what the layers before it are to come to.

The logits say where a token's whole way should end, the stream where the way behind the cut should
begin: the layers behind it are then given what they were trained on. `Settings.residual` weighs its
error beside the KL of the logits.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.reference.decoder import load_decoder
from engine.reference.stream import marked


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared error of streams (..., D) over the squared length of
    `expected`: one token in some hundreds is a hundred times as long as the others."""
    error = (found.float() - expected).square().sum(-1)
    return (error / expected.square().sum(-1)).mean()


class Streams:
    """The teacher's residual stream before the layers `ends`, of which the last may be the number
    of its layers, for windows (N, W), each computed where it is first asked for.

    Kept as `Teacher` keeps logits, in bfloat16: rounding is a thousandth of what is left to learn.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        ends: Sequence[int],
        windows: torch.Tensor,
        directory: Path,
        name: str,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.ends, self.windows = tuple(ends), windows
        config: ModelConfig = teacher.config.keep(range(max(ends)))
        self.decoder = load_decoder(teacher, config, device, dtype)
        directory.mkdir(parents=True, exist_ok=True)
        width = windows.shape[1]  # in the name, too: the same text may be cut otherwise
        digest = hashlib.sha256(f"{name} {width} {self.ends} {dtype}".encode()).hexdigest()[:16]
        shape = len(windows), len(ends), width, config.hidden_size
        self.values, self.done = marked(
            directory / f"streams-{digest}", len(windows), values=(torch.bfloat16, shape)
        )

    def __call__(self, window: int) -> torch.Tensor:
        """(cuts, W, D) float32 of a window."""
        if not self.done[window]:
            decoder, tokens = self.decoder, self.windows[window : window + 1]

            def tap(boundary: int, x: torch.Tensor) -> None:
                if boundary in self.ends:
                    self.values[window, self.ends.index(boundary)] = x[0].cpu()

            cache = decoder.new_cache(*tokens.shape)
            decoder.forward(tokens.to(decoder.device), cache, tap=tap)
            self.done[window] = 1
        return self.values[window].float()
