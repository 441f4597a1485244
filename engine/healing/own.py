"""A second round, on what the healed model writes itself: it learns to leave its circles.

Text of others teaches a model what comes next, and its own greedy text to go round in circles more
than before: of the default model without five layers 73 % of it did, after this round 60 %, of the
whole model 52 to 57 % (benchmarks/results/heal.md). So the student writes, likeliest token by
likeliest token, and the teacher is asked what it would have said there (Agarwal et al., arXiv
2306.13649), but that a token which goes on in a circle is made e**PENALTY times less likely
(Welleck et al., arXiv 1908.04319, punish it by the loss). Within a word nothing changes, where the
teacher is sure; where the circle can be left it is. Half of the round's text is what it learnt
from before.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.healing.data import Data
from engine.healing.settings import Settings
from engine.healing.written import Write, written
from engine.options import Options
from engine.progress import Report

PENALTY = 4.0  # nats
LONGEST = 32  # period of a circle, in tokens
LEAST = 8  # tokens that go round before it is one
SHARE = 0.25  # of the first round's steps or minutes, at most
RATE = 0.5  # of its learning rate
MOST_RATE = 5e-5  # more, and it forgets the kinds of text that it does not learn from


def repeating(row: Sequence[int]) -> list[int]:
    """Positions whose next token goes on in a circle: it and the last max(p, LEAST) tokens are what
    stood p earlier, for a period p of at most LONGEST."""
    found = []
    same = [0] * (LONGEST + 1)  # by period: how many tokens up to here are what stood p earlier
    for at, token in enumerate(row):
        circles = False
        for p in range(1, min(LONGEST, at) + 1):
            same[p] = same[p] + 1 if row[at - p] == token else 0
            circles |= same[p] > max(p, LEAST)
        if circles:
            found.append(at - 1)
    return found


def avoiding(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """logits (1, W, V) of tokens (1, W), those of tokens that go on in a circle lowered."""
    row = tokens[0].tolist()
    at = torch.tensor(repeating(row), dtype=torch.int64)
    lowered = logits.clone()
    lowered[0, at, tokens[0, at + 1]] -= PENALTY
    return lowered


def own_windows(
    data: Data,
    tokens: int,
    write: Write,
    directory: Path,
    *,
    name: str,
    seed: int,
    most: int,
    report: Report,
) -> torch.Tensor:
    """What the student writes, greedily, from beginnings of the text: (M, W) int64, W even, two of
    its texts a window."""
    half = data.windows.shape[1] // 2
    rows = written(
        data.windows[:, :half], -(-tokens // (2 * half)) * 2 * half, None, write, directory,
        name=f"own {name}", seed=seed, most=most, report=report, options=Options(ignore_eos=True),
    )  # fmt: skip
    return rows.view(-1, 2 * half)


def mixed(texts: int, own: int) -> torch.Tensor:
    """Windows of a round, as indices into those of the text and the student's own behind them: each
    of its own once, and as many of the text, spread over all of it: of a part of it alone the
    student forgets what it learnt of the rest."""
    each = torch.arange(own)
    return torch.cat((each * texts // own, texts + each))


def second(settings: Settings, windows: int) -> Settings:
    """What is asked of the second round, which goes at most once through its `windows`: more takes
    fewer circles away than it costs of all else."""
    once = -(-windows // settings.batch)
    asked = once if settings.steps is None else max(1, round(settings.steps * SHARE))
    return replace(
        settings,
        steps=min(once, asked),
        minutes=None if settings.minutes is None else settings.minutes * SHARE,
        lr=min(settings.lr * RATE, MOST_RATE),
        residual=0.0,  # it learns words, and the streams of its own text would have to be kept
        patience=1 << 30,  # what it learns is not what the held-out text measures
    )


def digest(weights: dict[str, torch.Tensor]) -> str:
    """Of a student, which names what it writes."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(weights[name].contiguous().numpy().tobytes())
    return found.hexdigest()
