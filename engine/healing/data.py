"""Text to learn from: packed windows, what is held out of them, and their seeded order."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from engine.errors import InputError
from engine.healing.randomness import seed_of
from engine.judgement import BUILT_IN, geometric_mean
from engine.text import Text
from engine.text.samples import COLUMN, is_running_text, read_samples

MOST = 20_000  # windows or rows of a source; a dataset of the hub may have no end
LONGEST_ROW = 1 << 20  # tokens
HELD_OUT = 8  # windows, and of each source at most a twentieth
PATCH_WINDOWS = 64  # 33 thousand tokens of 512: many times what a width of some thousand needs


@dataclass(frozen=True)
class Data:
    """Windows (N, W) int64 to learn from, and others (n, W) to measure with."""

    windows: torch.Tensor
    held_out: torch.Tensor

    @property
    def hash(self) -> str:
        """Of the token ids that are learnt from."""
        return hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()

    @property
    def held_out_hash(self) -> str:
        return hashlib.sha256(self.held_out.numpy().tobytes()).hexdigest()

    def extended(self, rows: torch.Tensor) -> "Data":
        """With `rows` (M, W), of which the last of every twenty is held out."""
        out = torch.arange(len(rows)) % 20 == 19
        taken = rows[out][:HELD_OUT]
        learnt = torch.cat((rows[~out], rows[out][HELD_OUT:]))
        return Data(torch.cat((self.windows, learnt)), torch.cat((self.held_out, taken)))

    def spread(self, count: int = PATCH_WINDOWS) -> list[torch.Tensor]:
        """Up to so many windows, evenly over the text, as batches of one."""
        total = len(self.windows)
        taken = range(total) if total <= count else [i * total // count for i in range(count)]
        return [self.windows[i : i + 1] for i in taken]

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """The windows of a step: every one once an epoch, in an order that `seed` alone draws."""
        return [self.drawn(place, seed) for place in range(step * size, (step + 1) * size)]

    def drawn(self, place: int, seed: int) -> int:
        """The window at a place of that order."""
        epoch, place = divmod(place, len(self.windows))
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        return int(torch.randperm(len(self.windows), generator=generator)[place])


def read_data(
    sources: Sequence[str | None],
    held_out: str | None,
    text: Text,
    window: int,
    column: str = COLUMN,
) -> Data:
    """Every source packed into windows, None being the built-in text; without `held_out` the tail
    of each is held out."""
    if not sources:
        raise InputError("text: expected a text to learn from, found none")
    learnt, tails = [], []
    for source in sources:
        windows = pack(source, text, window, column)
        tail = 0 if held_out else max(1, min(HELD_OUT, len(windows) // 20))
        if tail >= len(windows):
            raise InputError(
                f"{source or BUILT_IN}: expected 2 windows of {window} tokens, found 1"
            )
        learnt.append(windows[: len(windows) - tail])
        tails.append(windows[len(windows) - tail :])
    apart = pack(held_out, text, window, column) if held_out else torch.cat(tails)
    taken = sorted({i * len(apart) // HELD_OUT for i in range(HELD_OUT)})
    return Data(torch.cat(learnt), apart[taken])


def pack(source: str | None, text: Text, window: int, column: str) -> torch.Tensor:
    """(N, window) int64: a source's tokens in a row, cut; each window begins as its samples do."""
    length = window if is_running_text(source) else LONGEST_ROW
    samples, bos = read_samples(source, text, length, most=MOST, column=column)
    room = window - bos
    ids = torch.tensor([token for sample in samples for token in sample[bos:]])
    windows = ids[: len(ids) // room * room].view(-1, room)
    if not len(windows):
        raise InputError(
            f"{source or BUILT_IN}: expected at least {window} tokens, found {len(ids)}"
        )
    return torch.cat([torch.full((len(windows), 1), samples[0][0]), windows], 1) if bos else windows


@torch.no_grad()
def perplexity(logits: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor) -> float:
    """Of windows (n, W), one at a time: `logits` gives (1, W, V) for tokens (1, W)."""
    nlls = []
    for window in windows:
        found = logits(window[None])[0, :-1].float()
        nlls.append(float(functional.cross_entropy(found, window[1:].to(found.device))))
    return geometric_mean(nlls)
