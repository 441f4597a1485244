"""What a generation can be asked for, checked before anything runs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from operator import index
from typing import Any, SupportsIndex

from engine.errors import InputError, check_choice

Stop = str | int | Sequence[str | int] | None
DRAFTS = ("ngram",)
_HUGE = 10**4000  # Python refuses to print 4,300 digits and more
Slots = Sequence[int] | Sequence[Sequence[int]]  # ascending: one list for all, or one a sequence


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the filters run in the order of the fields below.

    Every combination leaves at least the most likely token. Values out of range raise `InputError`.
    """

    repetition_penalty: float = 1.0  # 0.001..1000; 1 = off; over prompt and generated ids
    temperature: float = 0.0  # 0 = greedy, or 1e-6..1e6
    top_k: int = 0  # 0 = off
    top_p: float = 1.0  # 0..1; 1 = off
    min_p: float = 0.0  # 0..1, of the most likely token's probability; 0 = off
    seed: int | None = None  # None = drawn from the operating system

    def __post_init__(self) -> None:
        # Both ranges keep float32 logits finite and are wider than any use.
        expected = "a number from 0.001 to 1000"
        self._check("repetition_penalty", expected, lambda v: 1e-3 <= v <= 1e3)
        expected = "0 (greedy) or a number from 1e-6 to 1e6"
        self._check("temperature", expected, lambda v: v == 0 or 1e-6 <= v <= 1e6)
        self._check("top_k", "a whole number of at least 0", lambda v: v >= 0, int)
        self._check("top_p", "a number from 0 to 1", lambda v: 0 <= v <= 1)
        self._check("min_p", "a number from 0 to 1", lambda v: 0 <= v <= 1)
        if self.seed is not None:
            self._check("seed", "a whole number", lambda v: abs(v) < _HUGE, int)

    def _check(
        self, name: str, expected: str, holds: Callable[[Any], bool], kind: type = float
    ) -> None:
        """Raises `InputError` unless the value is a finite number of the kind and within the range;
        an array library's becomes Python's own."""
        value = getattr(self, name)
        numeric = isinstance(value, Integral if kind is int else Real) and type(value) is not bool
        if not (numeric and _is_finite(value, kind) and holds(value)):
            huge = isinstance(value, int) and abs(value) >= _HUGE  # that Python will not print
            raise InputError(
                f"{name} must be {expected}, not {'one of so many digits' if huge else repr(value)}"
            )
        if type(value) not in (int, float):
            object.__setattr__(self, name, kind(value))

    @property
    def is_greedy(self) -> bool:
        """The likeliest token is taken, whatever came before."""
        return self.temperature == 0 and self.repetition_penalty == 1


@dataclass(frozen=True)
class Options(Sampling):
    """Everything `generate` can be asked for: `Sampling` and when to stop."""

    max_new_tokens: int = 128
    stop: Stop = ()  # stop strings, and token ids beside the model's own
    ignore_eos: bool = False  # the model's own stop tokens do not end a sequence
    slots: Slots | None = None  # which layers run, passed through to the runtime; None = all
    speculate: str | None = None  # one of DRAFTS: tokens that are guessed, and verified at once

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "stop", self.stops)
        self._check("max_new_tokens", "a whole number", lambda v: v < 1 << 63, int)
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.speculate is not None:
            check_choice("speculate", self.speculate, DRAFTS)

    @property
    def stops(self) -> tuple[str | int, ...]:
        """`stop`, one or several, as several; InputError for what is neither text nor an id."""
        if self.stop is None:
            return ()
        given: Any = self.stop
        if hasattr(given, "tolist"):  # an array's or a tensor's numbers become Python's own
            given = given.tolist()
        if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict):
            return (_stop(given),)
        return tuple(map(_stop, given))


def _stop(item: Any) -> str | int:
    if isinstance(item, str) and item:
        return item
    if hasattr(item, "tolist"):
        item = item.tolist()
    if isinstance(item, str | bool) or not isinstance(item, SupportsIndex):
        raise InputError(f"stop takes strings that are not empty and ids, not {item!r:.80}")
    if not -(1 << 31) <= index(item) < 1 << 31:
        raise InputError("stop takes ids of 32 bits, found a larger one")
    return index(item)


def _is_finite(value: Any, kind: type) -> bool:
    """Also of whole numbers beyond what a float holds, which are no floats."""
    try:
        return kind is int or math.isfinite(value)
    except OverflowError:
        return False
