"""Which layers to drop: each rule a pure function of a profile, or of a score for kept layers.

All numbers are slots of the profiled model, 0-based, until `plan_from` turns them into layers of
the checkpoint. `Score` is what the command wires to a runtime: lower is better, and a call with
the same layers gives the same number.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.architecture.layers import format_layers
from engine.artifacts import Plan, Profile
from engine.errors import InputError

Score = Callable[[tuple[int, ...]], float]  # kept slots, ascending -> loss or divergence


@dataclass(frozen=True)
class Choice:
    """Dropped slots, the number that the rule made smallest, and a word on how it came about."""

    drop: tuple[int, ...]
    score: float | None = None
    note: str = ""


def default_protection(total: int) -> frozenset[int]:
    """The first two layers and the last: they carry most and are bent by no rule of distance."""
    return frozenset({0, 1, total - 1} & set(range(total)))


def check_count(total: int, count: int, protect: frozenset[int]) -> None:
    """InputError unless 1 <= count and enough unprotected layers are there to drop."""
    free = total - len(protect)
    if not 1 <= count < total:
        raise InputError(f"count: expected 1 to {total - 1} of {total} layers, found {count}")
    if count > free:
        raise InputError(
            f"count: {count} of {total} layers cannot go while {len(protect)} are protected "
            f"({free} are free); protect or drop fewer"
        )


def similarity(profile: Profile, count: int, protect: frozenset[int] = frozenset()) -> Choice:
    """The contiguous block of smallest angular distance (Gromov et al.), clear of `protect`."""
    total = len(profile.layers)
    check_count(total, count, protect)
    starts = [s for s in range(total - count + 1) if protect.isdisjoint(range(s, s + count))]
    if not starts:
        raise InputError(
            f"count: no block of {count} layers is free of the protected "
            f"{[profile.layers[slot] for slot in sorted(protect)]}"
        )
    start = min(starts, key=lambda s: profile.distance(s, count))
    best = profile.best(count)
    note = ""
    if profile.distance(best, count) < profile.distance(start, count):
        layers = profile.layers[best : best + count]
        together = layers[-1] - layers[0] == count - 1
        block = f"{layers[0]}-{layers[-1]}" if together else format_layers(layers)
        note = (
            f"protection overrode the block {block} of smallest distance "
            f"{profile.distance(best, count):.6f}"
        )
    return Choice(tuple(range(start, start + count)), profile.distance(start, count), note)


def simple(total: int, count: int) -> Choice:
    """The deepest layers but the last (Gromov et al., section 4.4)."""
    check_count(total, count, frozenset({total - 1}))
    return Choice(tuple(range(total - 1 - count, total - 1)))


def influence(profile: Profile, count: int, protect: frozenset[int] = frozenset()) -> Choice:
    """The layers of smallest block influence, contiguous or not (ShortGPT, 2403.03853)."""
    total = len(profile.layers)
    check_count(total, count, protect)
    order = sorted(range(total), key=lambda layer: (profile.influence[layer], layer))
    chosen = sorted([layer for layer in order if layer not in protect][:count])
    note = ""
    if chosen != (least := sorted(order[:count])):
        layers = format_layers([profile.layers[slot] for slot in least])
        note = f"protection overrode the layers {layers} of smallest influence"
    return Choice(tuple(chosen), sum(profile.influence[layer] for layer in chosen), note)


def manual(slots: Sequence[int], total: int) -> Choice:
    """Exactly these slots."""
    drop = tuple(sorted(set(slots)))
    if not drop or drop[0] < 0 or drop[-1] >= total or len(drop) >= total:
        raise InputError(
            f"drop: expected some but not all of the slots 0-{total - 1}, found {drop}"
        )
    return Choice(drop)


def plan_from(
    profile: Profile,
    choice: Choice,
    rule: str,
    protect: frozenset[int] = frozenset(),
    text_hash: str | None = None,
) -> Plan:
    """The Plan of a choice, in layers of the checkpoint. What the profile left out stays out."""
    dropped = set(choice.drop)
    keep = tuple(layer for slot, layer in enumerate(profile.layers) if slot not in dropped)
    return Plan(
        model=profile.model,
        architecture=profile.architecture,
        lineage=profile.lineage,
        total_layers=profile.total_layers,
        keep=keep,
        rule=rule,
        score=choice.score,
        protect=tuple(sorted(profile.layers[slot] for slot in protect)),
        profile=profile.hash,
        text_hash=text_hash,
        note=choice.note,
    )


def largest_count(profile: Profile, max_distance: float, protect: frozenset[int]) -> int:
    """The most layers whose best free block stays within `max_distance`; InputError if none."""
    if not 0 < max_distance <= 1:
        raise InputError(f"max-distance: expected a number in (0, 1], found {max_distance}")
    best = 0
    for count in range(1, len(profile.layers) - len(protect) + 1):
        try:
            choice = similarity(profile, count, protect)
        except InputError:
            break  # no block of this size is free
        if profile.distance(choice.drop[0], count) <= max_distance:
            best = count
    if not best:
        raise InputError(f"max-distance: no free block lies within {max_distance}")
    return best


def greedy(
    score: Score,
    total: int,
    count: int,
    protect: frozenset[int] = frozenset(),
    on_drop: Callable[[tuple[int, ...], float], None] | None = None,
    on_score: Callable[[tuple[int, ...], float], None] | None = None,
    guesses: Sequence[float] | None = None,
) -> Choice:
    """Drops one layer at a time, the one whose loss scores best, re-scored after each.

    `on_drop` is told (kept, score) after each removal; a scorer may anchor its prefix there.
    `on_score` is told the best so far after each score; a scorer may give up what exceeds it. The
    order of scores does not change the choice: those of small `guesses`, one a slot, come first,
    and from the second removal on those that scored best before.
    """
    check_count(total, count, protect)
    kept = tuple(range(total))
    costs = dict(enumerate(guesses or [0.0] * total))
    best = math.inf
    for _ in range(count):
        found: list[tuple[float, tuple[int, ...]]] = []
        for layer in sorted(set(kept) - protect, key=lambda layer: (costs[layer], layer)):
            candidate = tuple(other for other in kept if other != layer)
            costs[layer] = score(candidate)
            found.append((costs[layer], candidate))
            if on_score is not None:
                best, least = min(found)
                on_score(least, best)
        best, kept = min(found)
        if on_drop is not None:
            on_drop(kept, best)
    return Choice(_complement(kept, total), best)


def greedy_scores(total: int, count: int, protect: frozenset[int] = frozenset()) -> int:
    """How many scores `greedy` asks for."""
    free = total - len(protect)
    return sum(free - dropped for dropped in range(count))


def search(
    score: Score,
    total: int,
    start: Choice,
    protect: frozenset[int] = frozenset(),
    *,
    seed: int = 0,
    evaluations: int | None = 200,
    seconds: float | None = None,
    on_score: Callable[[tuple[int, ...], float], None] | None = None,
) -> Choice:
    """Evolution from `start` (a greedy choice): swaps layers between dropped and kept.

    (1 + 8) selection as in EvoPress (2410.14649): each child of the best set swaps one to
    three layers; it replaces the parent when it scores lower. Never worse than `start`. Stops
    after so many evaluations or seconds, whichever comes first. `on_score` is told the best so far
    (kept, score) after each.
    """
    if evaluations is None and seconds is None:
        raise InputError("search: expected a budget of evaluations or seconds, found neither")
    if seconds is not None and not seconds >= 0:  # NaN would never be over
        raise InputError(f"seconds: expected a number of at least 0, found {seconds}")
    rng = random.Random(seed)
    parent = start.drop
    best = score(_complement(parent, total))
    seen = {parent}
    end = None if seconds is None else time.monotonic() + seconds
    used = 1
    idle = 0
    while idle < 50:  # that many fruitless draws: the neighbourhood is exhausted
        if (evaluations is not None and used >= evaluations) or (end and time.monotonic() >= end):
            break
        generation = []
        for _ in range(8):
            child = _swap(parent, total, protect, rng)
            if child not in seen:
                seen.add(child)
                generation.append(child)
        idle = 0 if generation else idle + 1
        if evaluations is not None:
            generation = generation[: evaluations - used]
        for child in generation:
            if end and time.monotonic() >= end:
                break
            used += 1
            found = score(_complement(child, total))
            if found < best:
                best, parent = found, child
            if on_score is not None:
                on_score(_complement(parent, total), best)
    return Choice(parent, best, f"{used} evaluations, seed {seed}")


def _swap(
    drop: Sequence[int], total: int, protect: frozenset[int], rng: random.Random
) -> tuple[int, ...]:
    dropped = list(drop)
    kept = [layer for layer in range(total) if layer not in set(drop) | protect]
    swaps = min(rng.choice((1, 1, 2, 3)), len(dropped), len(kept))
    out, back = rng.sample(dropped, swaps), rng.sample(kept, swaps)
    return tuple(sorted((set(dropped) - set(out)) | set(back)))


def _complement(layers: Sequence[int], total: int) -> tuple[int, ...]:
    inside = set(layers)
    return tuple(layer for layer in range(total) if layer not in inside)
