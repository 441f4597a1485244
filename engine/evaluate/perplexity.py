"""How well a model predicts a text: perplexity, and agreement with a second model."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from engine.architecture.layers import format_layers
from engine.artifacts import Evaluation
from engine.errors import InputError, NotFiniteError
from engine.judgement import WINDOW, geometric_mean
from engine.runtime import Runtime, at_once
from engine.sample import NOT_FINITE
from engine.text import Text
from engine.text.samples import bos_prefix

LOGITS_BYTES = 256 * 2**20  # of one call of the runtime; bounds memory whatever the vocabulary
ROWS = 64  # positions whose softmax is taken at once; its temporaries are a few (ROWS, V)


def evaluate(
    runtime: Runtime[Any],
    text: Text,
    content: str,
    *,
    name: str = "",
    rule: str | None = None,
    window: int = WINDOW,
    count: int | None = None,
    bos: bool | None = None,
    source: str | None = None,
    second: Runtime[Any] | None = None,
    slots: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `content` under `runtime`, and agreement with the runtime `second` if given.

    The text is tokenised without special tokens and cut into consecutive windows of `window`
    tokens (a rest is left out), `count` of them or all. Each window is run on its own and the
    negative log-likelihood averaged over its positions 1 .. window - 1. With `bos`, by default
    where the tokenizer has the habit, every window begins with the BOS token, followed by
    window - 1 tokens of text. `progress` is called with positions done and in total. `slots` are
    the layers that `runtime` runs; `second` runs all. `name` of the model, `rule` that chose its
    layers and `source` of the text are recorded as they are. Raises `InputError` for a text too
    short, and for models whose vocabularies differ in size.
    """
    if second is not None:
        check_vocabularies(runtime, second)
    vocab_size = runtime.config.vocab_size
    prefix = bos_prefix(text, bos)
    windows = cut_windows(text, content, window, count, bool(prefix), runtime.config.max_context)
    total = windows.shape[0] * (window - 1)
    sums = torch.zeros(3, dtype=torch.float64)
    done = 0
    models = [runtime] if second is None else [runtime, second]
    size = at_once(max(1, _positions_a_call(vocab_size) // window), *models)
    for batch in windows.split(size):
        for part, positions in _compare(runtime, second, batch, slots):
            sums += part
            done += positions
            if progress:
                progress(done, total)
    nll, kl, agreement = (sums / total).tolist()
    if not (math.isfinite(nll) and math.isfinite(kl)):
        raise NotFiniteError(NOT_FINITE)
    spanned = windows.shape[0] * (window - len(prefix))  # tokens of text
    held = runtime.config.layers
    layers = [entry.layer for entry in (held if slots is None else map(held.__getitem__, slots))]
    return Evaluation(
        model=name,
        layers=format_layers(layers),
        layers_kept=len(layers),
        layers_total=runtime.config.total_layers,
        rule=rule,
        perplexity=geometric_mean([nll]),
        nll=nll,
        tokens=total,
        windows=windows.shape[0],
        window=window,
        bos=bool(prefix),
        text_hash=hashlib.sha256(repr(windows.tolist()).encode()).hexdigest(),
        kl=None if second is None else kl,
        top1_agreement=None if second is None else agreement,
        text=source,
        bits_per_byte=nll / math.log(2) * spanned / text.span_bytes(content, spanned),
    )


def check_vocabularies(runtime: Runtime[Any], second: Runtime[Any]) -> None:
    """InputError unless both have as many tokens."""
    sizes = runtime.config.vocab_size, second.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"models with vocabularies of {sizes[0]} and {sizes[1]} tokens cannot be compared"
        )


def cut_windows(
    text: Text,
    content: str,
    window: int,
    count: int | None,
    bos: bool,
    max_context: int,
    where: str = "the text",
) -> torch.Tensor:
    """The windows that `evaluate` runs: (windows, window) int64. Raises `InputError`."""
    if not 2 <= window <= max_context:
        raise InputError(
            f"window must be from 2 to the model's context {max_context}, not {window}"
        )
    if count is not None and count < 1:
        raise InputError(f"count must be at least 1, not {count}")
    prefix = bos_prefix(text, bos)
    ids = torch.tensor(text.encode(content, add_special=False), dtype=torch.int64)
    width = window - len(prefix)  # tokens of text a window
    available = len(ids) // width
    if available < (count or 1):
        raise InputError(
            f"{where} has {len(ids)} tokens; {count or 1} windows of {width} need "
            f"{(count or 1) * width}"
        )
    count = count or available
    windows = ids[: count * width].view(count, width)
    return torch.cat([torch.tensor([prefix] * count, dtype=torch.int64), windows], dim=1)


def _positions_a_call(vocab_size: int) -> int:
    return max(1, LOGITS_BYTES // (4 * vocab_size))


def _compare(
    runtime: Runtime[Any],
    second: Runtime[Any] | None,
    windows: torch.Tensor,
    slots: Sequence[int] | None,
) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields (`_sums`, positions) along windows (B, window), a bounded number of logits a time."""
    inputs, targets = windows[:, :-1], windows[:, 1:]
    cache = runtime.new_cache(*inputs.shape)
    second_cache = second.new_cache(*inputs.shape) if second is not None else None
    step = _positions_a_call(runtime.config.vocab_size)
    if runtime.config.whole_prefill:
        step = inputs.shape[1]
    for tokens, following in zip(inputs.split(step, 1), targets.split(step, 1), strict=True):
        logits = runtime.forward(tokens.to(runtime.device), cache, slots=slots, logits="all")
        other = None
        if second is not None:
            other = second.forward(tokens.to(second.device), second_cache, logits="all")
        yield _sums(logits, following, other), following.numel()


def _sums(logits: torch.Tensor, targets: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """(nll, kl, agreement) float64, summed over the positions of logits (B, n, V)."""
    logits, targets = logits.flatten(0, 1), targets.flatten().to(logits.device)
    other = other.flatten(0, 1).to(logits.device) if other is not None else None
    sums = torch.zeros(3, dtype=torch.float64)
    for at in range(0, len(logits), ROWS):
        rows = slice(at, at + ROWS)
        log_q = logits[rows].log_softmax(-1)
        sums[0] -= log_q.gather(-1, targets[rows, None]).double().sum().cpu()
        if other is not None:
            log_p = other[rows].log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)  # (rows,) of KL(P || Q)
            sums[1] += kl.double().sum().cpu()
            sums[2] += (log_p.argmax(-1) == log_q.argmax(-1)).sum().cpu()
    return sums
