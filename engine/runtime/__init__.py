"""The protocol every backend keeps, and all that generation and evaluation know of a model.

    forward(tokens (B, T), cache, slots=None, logits="last" | "all") -> (B, 1 or T, V) float32

covers prefill, one step, and the verification of several tokens at once. Negative tokens are left
padding. The cache keeps a length for every (sequence, slot); a call at position p needs [0, p)
filled in every slot that it runs, and raises otherwise.

What only some runtimes can do is a protocol of its own, for `isinstance`: `Greedy`, `Drawing`,
`Verifying`, `Timed`; so is what some cannot: `Bounded`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from engine.architecture.config import ModelConfig
from engine.errors import InputError, check_choice
from engine.kernels.dispatch import BackendUnavailable, require, why_not
from engine.kernels.dtypes import DTYPES
from engine.options import Sampling, Slots

if TYPE_CHECKING:
    import torch

GPU_RUNTIMES = ("triton", "cuda")  # engine/runtime/gpu.py, by the kernels that it prefers
RUNTIMES = ("reference", "cpu", *GPU_RUNTIMES)


def check_backend(name: str | None, dtype: str | None) -> None:
    """InputError for a runtime that is unknown or lacks the dtype; None stands for a free choice.

    BackendUnavailable, with the reason, for one that cannot run here.
    """
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    if name is not None:
        check_choice("backend", name, RUNTIMES)
    if name == "cpu":
        if dtype not in (None, "float32"):
            raise InputError(f"dtype: the backend cpu has float32 alone, found {dtype}")
        require(name)
    if name in GPU_RUNTIMES:
        if dtype == "float32":
            raise InputError(f"dtype: the backend {name} has float16 and bfloat16, found {dtype}")
        require(name)
        if reason := why_not("triton"):  # "cuda" takes its kernels where it has none of its own
            raise BackendUnavailable(f"backend {name}: it needs triton's kernels: {reason}")


class Cache(Protocol):
    @property
    def lengths(self) -> "torch.Tensor":
        """(B, S) int64: the filled positions of each slot of each sequence."""

    @property
    def nbytes(self) -> int:
        """Bytes held, filled or not."""

    def truncate(self, lengths: "int | Sequence[int] | torch.Tensor") -> None:
        """Takes every sequence back to `lengths`, (B,) or one for all."""


C = TypeVar("C", bound=Cache)


class Runtime(Protocol[C]):
    """A model that runs; `C` is the kind of cache it makes and takes."""

    @property
    def name(self) -> str:
        """One of RUNTIMES."""

    @property
    def config(self) -> ModelConfig:
        """Of the layers that it holds."""

    @property
    def device(self) -> "torch.device":
        """Where tokens and logits are."""

    @property
    def dtype(self) -> "torch.dtype":
        """Of activations."""

    @property
    def precision(self) -> str:
        """The dtype for people, with what is rounded further."""

    @property
    def threads(self) -> int:
        """Of the CPU, that work on a step."""

    @property
    def prefill_chunk(self) -> int:
        """Prompt tokens of a sequence that a call takes at best: activations stay small however
        long the prompt."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights held."""

    @property
    def weight_bytes_per_token(self) -> int:
        """Bytes of weights that one decoded token reads."""

    def new_cache(self, batch: int, capacity: int | None = None) -> C:
        """Empty, for so many sequences, with room for `capacity` positions to start with."""

    def forward(
        self, tokens: "torch.Tensor", cache: C, slots: Slots | None = None, logits: str = "last"
    ) -> "torch.Tensor":
        """tokens (B, T) int64, on the CPU or `device` -> (B, 1, V) for "last" or (B, T, V) for
        "all", float32."""


@runtime_checkable
class Greedy(Protocol):
    """Knows the likeliest token at less cost than its logits."""

    def greedy(self, tokens: Sequence[int], cache: Any) -> list[int]:
        """Feeds one id to each sequence, -1 to those that have finished; the others' next ids.

        What `forward` and `engine.sample.likeliest` would give, with the same errors.
        """


@runtime_checkable
class Drawing(Protocol):
    """Draws tokens where their logits are."""

    def draw(
        self, tokens: Sequence[int], cache: Any, sampling: Sampling, uniforms: Sequence[float]
    ) -> list[int]:
        """As `greedy`; the next ids are what `engine.sample.draw` gives for a uniform a sequence.

        The temperature is above 0, and there is no repetition penalty.
        """


@runtime_checkable
class Verifying(Protocol):
    """Knows the likeliest tokens behind several at less cost than their logits."""

    def likeliest(self, tokens: "torch.Tensor", cache: Any) -> list[list[int]]:
        """Feeds tokens (B, T), -1 on the left of shorter rows; by row what follows each of them.

        What `forward` of all logits and `engine.sample.likeliest` would give, with the same errors.
        """


@runtime_checkable
class Bounded(Protocol):
    """Decodes at most `most_sequences` sequences in a step of one token each.

    Calls with several tokens of a sequence, prompts, have no such limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def most_sequences(self) -> int:
        """Of a call with one token of each: InputError for more."""


def at_once(count: int, *runtimes: Runtime[Any]) -> int:
    """Sequences that all of these runtimes take in any call; `count` at most."""
    bounds = (each.most_sequences for each in runtimes if isinstance(each, Bounded))
    return min((count, *bounds))


def too_many(runtime: Bounded, count: int) -> str:
    """What to say of `count` sequences, more than a runtime decodes."""
    return (
        f"batch: the backend {runtime.name} decodes at most {runtime.most_sequences} sequences at "
        f"once, found {count}: take {runtime.most_sequences} at a time"
    )


@dataclass(frozen=True)
class Times:
    """Of the steps since they were last cleared."""

    seconds: Mapping[str, float]  # part of a step -> of the thread that called
    bytes: Mapping[str, int]  # part -> weights that a step reads
    whole: float  # seconds of the native calls


@runtime_checkable
class Timed(Protocol):
    """Can tell where the time of its steps goes."""

    def measure(self, on: bool) -> None:
        """From now on; clears what was measured."""

    def times(self) -> Times: ...

    def kv_bytes(self, context: float) -> float:
        """Keys and values that a sequence's step reads at so many positions."""
