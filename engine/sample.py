"""Logits to token ids: repetition penalty, temperature, top-k, top-p, min-p, then one draw."""

import math
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from engine.errors import NotFiniteError
from engine.options import Sampling

_lock = threading.Lock()
_inside, _threads = 0, 1  # calls in one_thread(), and what torch has outside of them


def _forget() -> None:
    """In a forked child, which has none of the threads that were inside."""
    global _lock, _inside
    _lock, _inside = threading.Lock(), 0


os.register_at_fork(after_in_child=_forget)
NOT_FINITE = "the model produced logits that are not finite numbers"


def make_generators(seed: int | None, count: int) -> list[random.Random]:
    """One source of randomness a sequence: what one draws does not depend on its neighbours."""
    return [random.Random(None if seed is None else f"{seed}/{index}") for index in range(count)]


def sample(
    logits: torch.Tensor,
    sampling: Sampling,
    history: Sequence[Sequence[int]],
    generators: Sequence[random.Random],
) -> torch.Tensor:
    """The next token of every sequence: logits (B, V) float32 -> (B,) int64.

    `history` holds the ids that the repetition penalty looks at, `generators` one source of
    randomness a sequence (neither is touched where it has no effect). Among equal logits, greedy
    choice takes the lowest id. Raises `NotFiniteError` when a row holds NaN or infinity at its
    maximum, which no model in order produces.
    """
    best = likeliest(logits)
    if sampling.is_greedy:
        return best
    with one_thread():
        logits = penalise(logits, sampling, history)
        if sampling.temperature == 0:
            return likeliest(logits)
        uniforms = torch.tensor(
            [generator.random() for generator in generators], dtype=torch.float64, device="cpu"
        )
        return draw(logits, sampling, uniforms)


def threads() -> int:
    """What torch has outside of one_thread(); inside of another's call a new thread finds 1."""
    with _lock:
        return max(torch.get_num_threads(), _threads if _inside else 1)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps torch's threads asleep: once they shared an operation they spin for milliseconds, on
    the cores that the next step needs."""
    global _inside, _threads
    # A caller's thread that is new while another is inside finds 1, and would give that back.
    with _lock:
        if _inside == 0:
            _threads = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside = max(_inside - 1, 0)  # 0 behind a fork
            torch.set_num_threads(_threads)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """(B, V) -> (B,) int64, the lowest id of the largest logit; NotFiniteError unless finite."""
    if logits.device.type == "cpu":  # numpy: ten times as fast as torch there
        rows = logits.numpy()
        ids = rows.argmax(-1)
        finite = all(math.isfinite(row[id]) for row, id in zip(rows, ids, strict=True))
        ids = torch.from_numpy(ids)
    else:
        ids = logits.argmax(-1)
        finite = bool(logits.gather(-1, ids[:, None]).isfinite().all())
    if not finite:
        raise NotFiniteError(NOT_FINITE)
    return ids


def penalise(
    logits: torch.Tensor, sampling: Sampling, history: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Logits (B, V) with those of ids in a row's history divided (negative: multiplied)."""
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        known = [i for i in set(ids) if i < len(row)]
        seen = torch.tensor(known, dtype=torch.int64, device=row.device)
        row[seen] = torch.where(row[seen] < 0, row[seen] * penalty, row[seen] / penalty)
    return logits


def filter_logits(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Logits (B, V) divided by the temperature, -inf where top-k, top-p or min-p leave a token out.

    The same order and sets as transformers' warpers: ties with the k-th logit stay, and top-p takes
    the lowest ids first among equal logits.
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if sampling.top_p < 1:
        logits = logits.masked_fill(_outside_nucleus(logits, sampling.top_p), -math.inf)
    if sampling.min_p > 0:
        smallest = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    return logits


def _outside_nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """(B, V) bool: False for the fewest tokens whose probability reaches `top_p`, at least one."""
    probabilities = logits.double().softmax(-1)
    if logits.device.type != "cpu":  # it sorts fast, and to count columns would be to wait for it
        return beyond_top_p(logits, probabilities, top_p)
    # Tokens below this floor together hold less than 1 - top_p, so they are outside whatever their
    # order: only the rest is sorted (a few hundred columns of 100,000).
    floor = (1 - top_p) / (2 * logits.shape[-1])
    columns = (probabilities > floor).any(0).nonzero().squeeze(1)
    outside = torch.ones_like(logits, dtype=torch.bool)
    outside[:, columns] = beyond_top_p(logits[:, columns], probabilities[:, columns], top_p)
    return outside


def beyond_top_p(logits: torch.Tensor, probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same among these columns (B, C)."""
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    ranked = probabilities.gather(-1, order)
    outside = ranked.cumsum(-1) - ranked >= top_p
    outside[:, 0] = False
    return torch.empty_like(outside).scatter(-1, order, outside)


def draw(logits: torch.Tensor, sampling: Sampling, uniforms: torch.Tensor) -> torch.Tensor:
    """(B, V) float32 and (B,) float64 in [0, 1) -> (B,) int64: the token that the temperature and
    the filters give each row, by inverting the cumulative distribution; never one at -inf."""
    weights = filter_logits(logits, sampling).double().softmax(-1)
    cumulative = weights.cumsum(-1).masked_fill(weights == 0, -1)
    threshold = uniforms.to(logits.device)[:, None] * cumulative.amax(-1, keepdim=True)
    return (cumulative > threshold).to(torch.uint8).argmax(-1)
