"""The healing of "The Unreasonable Ineffectiveness of the Deeper Layers", as defaults.

Gromov et al., 2403.17887, appendix A: LoRA on the feed-forward matrices of a 4-bit base, AdamW,
cosine, 100 steps of warm-up, dropout 0.05, alpha = rank, 16 windows a step, 5,000 steps.
"""

import math
from dataclasses import dataclass, replace

from engine.architecture.config import ModelConfig
from engine.architecture.families import all_tensors
from engine.healing.settings import Settings

STEPS = 5000
WINDOWS = 16  # a step


@dataclass(frozen=True)
class Recipe:
    """What differs from model to model; `size` in parameters."""

    family: str
    size: float
    window: int  # tokens
    lr: float  # peak
    rank: int

    def fill(
        self,
        settings: Settings,
        lr: float | None,
        rank: int | None,
        window: int | None,
        batch_tokens: int | None,
    ) -> Settings:
        """`settings` with what the paper took where nothing else was asked for."""
        width = self.window if window is None else window
        return replace(
            settings,
            qlora_lr=self.lr if lr is None else lr,
            rank=self.rank if rank is None else rank,
            window=width,
            batch_tokens=WINDOWS * width if batch_tokens is None else batch_tokens,
        )


PAPER = (
    Recipe("llama", 7e9, 2048, 3e-4, 2),
    Recipe("llama", 13e9, 4096, 3e-4, 64),
    Recipe("llama", 70e9, 4096, 3e-5, 8),
    Recipe("mistral", 7e9, 2048, 3e-6, 4),
    Recipe("phi2", 2.7e9, 2048, 2e-4, 64),
    Recipe("qwen", 7e9, 2048, 3e-4, 64),
    Recipe("qwen", 14e9, 4096, 3e-4, 64),
)


def recipe_of(config: ModelConfig) -> Recipe:
    """That of the nearest size among models of its family, of Llama 2 where the paper has none.

    The size is that of the whole model, all layers; the window is at most its context, the rank
    its width.
    """
    family = "qwen" if config.family in ("qwen2", "qwen3") else config.family
    rows = [row for row in PAPER if row.family == family]
    rows = rows or [row for row in PAPER if row.family == "llama"]
    size = parameters(config)
    nearest = min(rows, key=lambda row: abs(math.log(row.size / size)))
    window = min(nearest.window, config.max_context)
    return Recipe(family, size, window, nearest.lr, min(nearest.rank, config.hidden_size))


def parameters(config: ModelConfig) -> int:
    """Of all layers of the checkpoint."""
    return sum(math.prod(shape) for _, shape in all_tensors(config, ()))
