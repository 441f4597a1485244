"""Text that a model writes: the teacher's own keeps what the healed model writes alive.

Half of the rows go on from the beginnings of windows of the text to learn from, spread over it;
the others, where the tokenizer has BOS, from nothing but that: what the teacher says unasked is of
every kind that it knows. Sampled at temperature 1 among tokens that are at least a fiftieth as
likely as the likeliest, which keeps out what a nucleus keeps out and sorts nothing.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from engine.healing.randomness import seed_of
from engine.options import Options
from engine.progress import Report
from engine.reference.stream import marked

PROMPT = 16  # tokens
ROWS = 32  # at once
SAMPLED = Options(temperature=1.0, min_p=0.02, ignore_eos=True)

Write = Callable[[Sequence[Sequence[int]], Options], Sequence[Sequence[int]]]  # what follows each


def prompts(windows: torch.Tensor, count: int, bos: int | None) -> list[list[int]]:
    """`count` beginnings of rows, from windows (N, W)."""
    length = min(PROMPT, windows.shape[1] // 2)
    spread = [windows[i * len(windows) // count, :length].tolist() for i in range(count)]
    if bos is None:
        return spread
    return [[bos] if i % 2 else row for i, row in enumerate(spread)]


def written(
    windows: torch.Tensor,
    tokens: int,
    bos: int | None,
    write: Write,
    directory: Path,
    *,
    name: str,
    seed: int,
    most: int,
    report: Report,
    options: Options = SAMPLED,
) -> torch.Tensor:
    """(M, W) int64: at least `tokens` tokens, in rows as long as those of `windows` (N, W), which
    the model's context of `most` tokens holds.

    They lie in `directory` under a name of their own, so that a killed run goes on with the batch
    it was at; `name` tells texts and teachers apart. A row that ends goes on, as packed texts do.
    """
    width = windows.shape[1]
    count = -(-tokens // width)
    digest = hashlib.sha256(f"{name} {count} {width} {seed} {bos}".encode()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"written-{digest}"
    rows, done = marked(path, count, rows=(torch.int32, (count, width)))
    given = prompts(windows, count, bos)
    for start in range(0, count, ROWS):
        taken = slice(start, min(start + ROWS, count))
        if not done[taken].all():
            drawn = replace(options, seed=seed_of(seed, start))
            for at in _together(given, taken, width, most):
                begun = [given[i] for i in at]
                asked = replace(drawn, max_new_tokens=width - min(map(len, begun)))
                more = write(begun, asked)
                whole = [[*one, *two][:width] for one, two in zip(begun, more, strict=True)]
                rows[at] = torch.tensor(whole, dtype=torch.int32)
            done[taken] = 1
        report(taken.stop * width, count * width)
    return rows.long()


def _together(
    given: Sequence[Sequence[int]], taken: slice, width: int, most: int
) -> list[list[int]]:
    """The rows of a batch that are written at once: all, unless the longest beginning does not fit
    beside what the shortest needs; then those of a length."""
    rows = range(taken.start, taken.stop)
    lengths = sorted({len(given[i]) for i in rows})
    if lengths[-1] + width - lengths[0] <= most:
        return [list(rows)]
    return [[i for i in rows if len(given[i]) == length] for length in lengths]
