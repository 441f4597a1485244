"""Which layers stay: the grammar of `--drop` and `--keep`, such as `3,7,21-25`."""

import re
from collections.abc import Iterable, Sequence
from operator import index

from engine.errors import InputError

_ITEM = re.compile(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?")
_MAX_DIGITS = 9  # keeps int() and ranges of absurd length out


def parse_layers(spec: str, total: int, option: str = "layers") -> tuple[int, ...]:
    """The layer numbers of `spec`, ascending: single numbers and inclusive ranges, by commas.

    `total` is the number of layers of the checkpoint; `option` is what errors call the text.
    Raises `InputError` for anything empty, malformed, reversed, repeated or out of range.
    """
    if not spec.strip():
        raise InputError(f"{option} is empty; expected layers such as 3,7,21-25")
    layers: list[int] = []
    for item in spec.split(","):
        match = _ITEM.fullmatch(item)
        if not match or max(map(len, filter(None, match.groups()))) > _MAX_DIGITS:
            raise InputError(f"{option}: {item[:24]!r} is neither a layer nor a range like 3-5")
        first = int(match[1])
        last = first if match[2] is None else int(match[2])
        if last < first:
            raise InputError(f"{option}: the range {first}-{last} runs backwards")
        _check_range(last, total, option)
        layers.extend(range(first, last + 1))
    return _distinct(layers, option)


def kept_layers(
    total: int,
    drop: str | Iterable[int] | None = None,
    keep: str | Iterable[int] | None = None,
) -> tuple[int, ...]:
    """The layers that stay of `total`, ascending, given what to drop or what to keep (not both).

    With neither, all stay. Raises `InputError` as `parse_layers` does, and when nothing would stay.
    """
    if drop is not None and keep is not None:
        raise InputError("drop and keep exclude each other; give one of them")
    if keep is not None:
        return _numbers(keep, total, "keep")
    if drop is None:
        return tuple(range(total))
    dropped = set(_numbers(drop, total, "drop"))
    if len(dropped) == total:
        raise InputError(f"drop names all {total} layers; at least one must stay")
    return tuple(layer for layer in range(total) if layer not in dropped)


def format_layers(layers: Sequence[int]) -> str:
    """The shortest text that `parse_layers` reads back as `layers` (ascending, distinct)."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _numbers(layers: str | Iterable[int], total: int, option: str) -> tuple[int, ...]:
    if isinstance(layers, str):
        return parse_layers(layers, total, option)
    if not isinstance(layers, Iterable):
        raise InputError(f"{option}: expected layers such as [3, 7, 21], found {layers!r}")
    numbers: list[int] = []
    for layer in layers:
        try:
            numbers.append(index(layer))
        except TypeError:
            raise InputError(f"{option}: {layer!r} is not a layer number") from None
        if isinstance(layer, bool):
            raise InputError(f"{option}: {layer!r} is not a layer number")
        _check_range(numbers[-1], total, option)
    if not numbers:
        raise InputError(f"{option} is empty; expected layers such as [3, 7, 21]")
    return _distinct(numbers, option)


def _check_range(layer: int, total: int, option: str) -> None:
    if not 0 <= layer < total:
        raise InputError(
            f"{option}: layer {layer} is out of range; the model has layers 0 to {total - 1}"
        )


def _distinct(layers: list[int], option: str) -> tuple[int, ...]:
    ordered = sorted(layers)
    for layer, following in zip(ordered, ordered[1:], strict=False):
        if layer == following:
            raise InputError(f"{option} names layer {layer} twice")
    return tuple(ordered)
