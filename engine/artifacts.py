"""What one stage hands to the next: frozen values that go to and from JSON files.

Each names what it came from by hash: `architecture` (the shapes of the model, the same for every
copy whatever its bits) and `lineage` (its norm weights, which quantization leaves alone).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from engine.errors import InputError
from engine.scratch import write_text


@dataclass(frozen=True)
class Artifact:
    """JSON and hashing for the artefacts below; `kind` and `version` stand in every file."""

    kind: ClassVar[str]
    version: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "version": self.version} | asdict(self)

    @property
    def hash(self) -> str:
        """sha256 of the canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Written beside and renamed, so that a reader never sees half a file."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """InputError when the file is unreadable, of another kind, newer, or incomplete."""
        return cls.from_json(read_raw(path), str(path))

    @classmethod
    def from_json(cls, raw: Any, where: str) -> Self:
        """From what a JSON file holds; InputError that begins with `where`, as for `load`."""
        found = raw.get("kind") if isinstance(raw, Mapping) else type(raw).__name__
        if found != cls.kind:
            raise InputError(f"{where}: expected {_a(cls.kind)}, found {found!r}")
        version = raw.get("version")
        if type(version) is not int or version < 1:
            raise InputError(f"{where}: version: expected a whole number, found {version!r}")
        if version > cls.version:
            raise InputError(
                f"{where}: {_a(cls.kind)} of version {version}; this Shallow reads up to "
                f"{cls.version}, a newer one is needed"
            )
        given = {name: value for name, value in raw.items() if name not in ("kind", "version")}
        try:
            made: Self = built(cls, given, cls.kind)
        except (TypeError, ValueError) as error:
            raise InputError(f"{where}: {error}") from error
        return made


def read_raw(path: Path) -> Any:
    """What a JSON file holds; InputError when it is unreadable."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def built(cls: type[Any], raw: Mapping[str, Any], name: str) -> Any:
    """The dataclass from its fields as JSON holds them; else ValueError."""
    hints, known = get_type_hints(cls), {field.name: field for field in fields(cls)}
    needed = {each for each, field in known.items() if field.default is MISSING}
    given = set(raw)
    if needed - given or given - set(known):  # older files lack what has a default now
        wrong = sorted(needed - given) or sorted(given - set(known))
        trouble = "is missing" if needed - given else "is not known"
        raise ValueError(f"{name}: {wrong[0]!r} {trouble}")
    try:
        return cls(**{each: _typed(raw[each], hints[each], each) for each in given})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _typed(value: Any, hint: Any, name: str) -> Any:
    """A value from JSON as a field of type `hint` holds it, tuples too; else ValueError."""
    outer, inner = get_origin(hint), get_args(hint)
    if outer is UnionType:
        return None if value is None and NoneType in inner else _typed(value, inner[0], name)
    if outer in (tuple, list) and isinstance(value, list | tuple):
        return outer(_typed(item, inner[0], name) for item in value)
    if outer in (dict, Mapping) and isinstance(value, dict):
        return {_typed(k, str, name): _typed(item, inner[1], name) for k, item in value.items()}
    if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        return built(hint, value, name)
    if type(value) is int and hint in (int, float):
        if abs(value) >> 64:
            found = repr(value)[:40]
            raise ValueError(f"{name}: expected a number of at most 64 bits, found {found}")
        return hint(value)
    if type(value) is str and value.encode(errors="ignore").decode() != value:
        raise ValueError(f"{name}: expected text, found half a character in {repr(value)[:40]}")
    if hint is Any or type(value) is hint:
        return value
    expected = getattr(outer or hint, "__name__", hint)
    raise ValueError(f"{name}: expected {expected}, found {repr(value)[:40]}")


MOST_LAYERS = 4096  # of a model, in a config too


def _check_layers(name: str, layers: tuple[int, ...], total: int) -> None:
    if type(total) is not int or not 0 < total <= MOST_LAYERS:
        raise ValueError(f"total_layers: expected 1 to {MOST_LAYERS}, found {total!r}")
    inside = all(type(n) is int and 0 <= n < total for n in layers)
    if not layers or not inside or list(layers) != sorted(set(layers)):
        raise ValueError(f"{name}: expected ascending layers below {total}")


@dataclass(frozen=True)
class Profile(Artifact):
    """How far each block of layers turns the residual stream (Gromov et al., 2403.17887).

    `distances[count - 1][start]` is the mean angular distance (0..1, 1 = opposite) between
    boundary `start` and boundary `start + count`, each a running number of the profiled model;
    `standard_errors` has the same shape. `influence[l]` is 1 - mean cosine across layer l
    (ShortGPT), `magnitude[l]` the mean of |x_out - x_in| / |x_out|.
    """

    kind: ClassVar[str] = "profile"

    model: str  # as it was asked for
    architecture: str  # hash
    lineage: str  # hash
    total_layers: int
    layers: tuple[int, ...]  # original numbers of the profiled layers
    distances: tuple[tuple[float, ...], ...]
    standard_errors: tuple[tuple[float, ...], ...]
    influence: tuple[float, ...]
    magnitude: tuple[float, ...]
    metric: str  # "angular"
    tokens: str  # "last": the last token of each sample; "all": every one but BOS and padding
    samples: int
    vectors: int  # averaged over
    tokens_used: int  # run through the model
    length: int  # longest sample, tokens
    bos: bool  # did samples begin with BOS
    text_hash: str

    def __post_init__(self) -> None:
        count = len(self.layers)
        _check_layers("layers", self.layers, self.total_layers)
        if not count == len(self.influence) == len(self.magnitude):
            raise ValueError(f"influence, magnitude: do not fit {count} layers")
        if not all(map(math.isfinite, (*self.influence, *self.magnitude))):
            raise ValueError("influence, magnitude: expected finite numbers")
        for name in ("distances", "standard_errors"):
            rows = getattr(self, name)
            if [len(row) for row in rows] != list(range(count, 0, -1)):
                raise ValueError(f"{name}: expected a triangle of {count} rows")
            if not all(0 <= value < 1 + 1e-9 for row in rows for value in row):
                raise ValueError(f"{name}: expected numbers from 0 to 1")

    def distance(self, start: int, count: int) -> float:
        """Mean angular distance across the block of `count` layers from `start`."""
        total = len(self.layers)
        if not 1 <= count <= total or not 0 <= start <= total - count:
            raise InputError(
                f"block: expected count 1-{total} and start 0-{total} - count, "
                f"found start {start}, count {count}"
            )
        return self.distances[count - 1][start]

    def best(self, count: int) -> int:
        """The start of the block of `count` layers of smallest distance, the first of ties."""
        row = [self.distance(start, count) for start in range(len(self.layers) - count + 1)]
        return min(range(len(row)), key=row.__getitem__)

    def rescaled(self, count: int) -> list[float]:
        """The row of the heat map: distances of all blocks of `count`, shifted and scaled to 0..1.

        A row whose distances are all equal is 0 throughout.
        """
        row = [self.distance(start, count) for start in range(len(self.layers) - count + 1)]
        low, span = min(row), max(row) - min(row)
        return [(value - low) / span if span else 0.0 for value in row]

    def slot(self, layer: int) -> int:
        """Where a layer of the checkpoint stands in the profiled model."""
        if layer not in self.layers:
            raise InputError(f"layer {layer} is not among the profiled layers of {self.model}")
        return self.layers.index(layer)


@dataclass(frozen=True)
class Plan(Artifact):
    """Which layers of a checkpoint stay, and why. Layer numbers are the checkpoint's, 0-based."""

    kind: ClassVar[str] = "plan"

    model: str
    architecture: str  # hash
    lineage: str  # hash
    total_layers: int
    keep: tuple[int, ...]
    rule: str
    score: float | None  # what the rule minimised
    protect: tuple[int, ...]
    profile: str | None  # hash of the profile it was made from
    text_hash: str | None  # of the text that it was chosen on
    note: str

    def __post_init__(self) -> None:
        _check_layers("keep", self.keep, self.total_layers)
        if self.score is not None and not math.isfinite(self.score):
            raise ValueError(f"score: expected a finite number, found {self.score}")

    @property
    def drop(self) -> tuple[int, ...]:
        """The layers that go, ascending; those that the profile had left out are among them."""
        kept = set(self.keep)
        return tuple(layer for layer in range(self.total_layers) if layer not in kept)

    def check(self, architecture: str, total_layers: int, where: str) -> None:
        """InputError unless it was made for a model of this hash and count, as `where` has them."""
        if self.architecture != architecture:
            raise InputError(
                f"the plan was made for {self.model}, whose layers have other shapes than those of "
                f"{where}"
            )
        if self.total_layers != total_layers:  # which the hash covers, unless a hand wrote it
            raise InputError(
                f"the plan was made for {self.total_layers} layers; {where} has {total_layers}"
            )


@dataclass(frozen=True)
class Evaluation(Artifact):
    """How well a model predicts a text, with the model and protocol that it depends on."""

    kind: ClassVar[str] = "evaluation"

    model: str  # as it was asked for
    layers: str  # run, as the checkpoint numbers them: "0-19,25-29"
    layers_kept: int
    layers_total: int
    rule: str | None  # that chose the layers, as in Plan; None where no plan did
    perplexity: float  # exp(nll)
    nll: float  # mean negative log-likelihood of a predicted token, nats
    tokens: int  # predicted tokens: windows * (window - 1)
    windows: int
    window: int  # tokens a window, the BOS included
    bos: bool
    text_hash: str  # of the token ids of all windows
    kl: float | None = None  # mean KL(second model || this one), nats
    top1_agreement: float | None = None  # share of positions where both have the same argmax
    text: str | None = None  # file, None where it is the built-in one
    bits_per_byte: float | None = None  # nll in bits * tokens of the windows / their UTF-8 bytes

    def __post_init__(self) -> None:
        if not 1 <= self.layers_kept <= self.layers_total <= MOST_LAYERS:
            raise ValueError(f"layers: {self.layers_kept} kept of {self.layers_total}")
        if not self.perplexity > 0:
            raise ValueError(f"perplexity: expected more than 0, found {self.perplexity}")
        if not self.nll >= 0:
            raise ValueError(f"nll: expected at least 0, found {self.nll}")


HEAL = "heal.json"  # the record of a healing, beside the weights
RECORDS = "records"  # of `engine shrink`, in what it made: what every stage gave


@dataclass(frozen=True)
class HealRecord(Artifact):
    """How a pruned model was healed: what from, by what, and how well."""

    kind: ClassVar[str] = "healing"

    model: str  # as it was asked for
    teacher: str
    lineage: str  # hash, of the teacher
    total_layers: int
    keep: tuple[int, ...]
    methods: tuple[str, ...]  # in order
    settings: dict[str, Any]
    steps: int
    best_step: int  # whose weights were written
    minutes: float  # of training
    stopped: str  # why training ended; empty where there was none
    losses: tuple[float, ...]  # one a step: nats a token, with --residual the streams' error added
    checks: tuple[float, ...]  # held-out perplexity along the training
    perplexity_before: float  # held-out, of the pruned model
    perplexity_after: float  # and of what was written, in its dtype
    text_hash: str  # of the token ids that were learnt from
    seed: int
    check_steps: tuple[int, ...] = ()  # of `checks`; records of earlier versions lack them

    def __post_init__(self) -> None:
        _check_layers("keep", self.keep, self.total_layers)
