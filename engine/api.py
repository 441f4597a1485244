"""`import engine` as a backend: a loaded model that generates, streams and gives logits."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, overload

import torch

from engine import generation
from engine.architecture.config import ModelConfig
from engine.artifacts import Plan
from engine.checkpoint import Checkpoint, choose_layers, open_checkpoint
from engine.checkpoint.fetch import DEFAULT
from engine.checkpoint.locate import locate
from engine.checkpoint.weights import is_quantized, named_dtype, not_finite
from engine.errors import InputError, NotFiniteError
from engine.generation import Generation, Prompt
from engine.kernels.dispatch import BackendUnavailable, no_gpu, why_not
from engine.kernels.dtypes import DTYPES, dtype_of, name_of
from engine.options import Options, Slots, Stop
from engine.prompts import as_prompts, as_tokens
from engine.pruning.budget import cost
from engine.runtime import GPU_RUNTIMES, Runtime, check_backend
from engine.text import Text, load_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from engine.reference.cache import KVCache
    from engine.runtime.cpu import CpuCache
    from engine.runtime.gpu_cache import GpuCache


@contextmanager
def locating_nan(path: Path) -> Iterator[None]:
    """Adds to what a model computes that is not finite where in its files that comes from."""
    try:
        yield
    except GeneratorExit:  # also at the interpreter's exit, when the names below are gone
        raise
    except NotFiniteError as error:
        name = not_finite(open_checkpoint(path))
        if name is None:
            raise
        raise NotFiniteError(f"{path}: {error}: {name} holds NaN or infinity") from None


class Asked(TypedDict, total=False):
    """The options of `Model.generate`, for its overloads."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: Stop
    seed: int | None
    ignore_eos: bool
    slots: Slots | None
    speculate: str | None


class AskedOnce(Asked, total=False):
    """Those of `generate`: of `load` too."""

    drop: str | Iterable[int] | Plan | None
    keep: str | Iterable[int] | None
    backend: str | None
    dtype: torch.dtype | str | None
    device: torch.device | str | None
    threads: int | None
    cache_dtype: str | None
    isa: str | None


class Model:
    """A runtime and the text side of its checkpoint. Made by `load`; `close` gives the memory back.

    `with engine.load(...) as model:` closes it at the end.
    """

    def __init__(self, path: Path, runtime: Runtime[Any]) -> None:
        self.path = path.absolute()  # the program may go elsewhere before the text is read
        self._runtime: Runtime[Any] | None = runtime

    @property
    def runtime(self) -> Runtime[Any]:
        """What runs it (engine/runtime); InputError once the model is closed."""
        if self._runtime is None:
            raise InputError(f"{self.path}: the model is closed")
        return self._runtime

    @property
    def config(self) -> ModelConfig:
        """What the model is, with the layers that were loaded; InputError once it is closed."""
        return self.runtime.config

    @cached_property
    def text(self) -> Text:
        """The light tokenizer, read from the checkpoint on first use."""
        return load_text(self.path)

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """A transformers tokenizer, made on first use (its import takes a second or more)."""
        return self.text.to_transformers()

    def close(self) -> None:
        """Drops the weights: what needs them is an error afterwards; closing twice is none."""
        self._runtime = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def locating_nan(self) -> AbstractContextManager[None]:
        """A NotFiniteError raised inside says which tensor of the files holds NaN or infinity."""
        return locating_nan(self.path)

    def __repr__(self) -> str:
        if self._runtime is None:
            return f"<Model {self.path.name}, closed>"
        runtime, config = self._runtime, self._runtime.config
        bits = 8 * runtime.weight_bytes / cost(config).total_parameters
        return (
            f"<Model {self.path.name}: {len(config.layers)} of {config.total_layers} layers, "
            f"{bits:.2f} bits a weight, {runtime.name} ({runtime.precision}) on {runtime.device}, "
            f"{runtime.threads} threads>"
        )

    @overload
    def generate(self, prompt: Prompt, **options: Unpack[Asked]) -> Generation: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]] | list[list[dict]], **options: Unpack[Asked]
    ) -> list[Generation]: ...
    @overload
    def generate(self, prompt: Any, **options: Unpack[Asked]) -> Generation | list[Generation]: ...
    def generate(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = Options.max_new_tokens,
        temperature: float = Options.temperature,
        top_k: int = Options.top_k,
        top_p: float = Options.top_p,
        min_p: float = Options.min_p,
        repetition_penalty: float = Options.repetition_penalty,
        stop: Stop = Options.stop,
        seed: int | None = Options.seed,
        ignore_eos: bool = Options.ignore_eos,
        slots: Slots | None = Options.slots,
        speculate: str | None = Options.speculate,
    ) -> Generation | list[Generation]:
        """Completes a prompt, or each of a list of prompts (a list in gives a list out).

        Args:
            prompt: raw text; chat messages, a list of `{"role": ..., "content": ...}`, through the
                chat template; token ids, as a list, an array or a tensor (T,); or what a
                transformers tokenizer returns, whose padding is left out. Several prompts: a list
                of these, or ids (B, T).
            max_new_tokens: at most so many tokens.
            temperature: 0 takes the likeliest token (greedy), whatever top_k to min_p and seed say.
            top_k: draw from the k likeliest tokens alone; 0: off.
            top_p: from the fewest tokens whose probabilities reach it; 1: off.
            min_p: from tokens of at least this share of the likeliest one's probability; 0: off.
            repetition_penalty: divides positive logits of tokens that the prompt or the answer has
                already, multiplies negative ones; 1: off.
            stop: text, or ids of tokens, that end it beside the model's own stop tokens.
            seed: for the same draws again, by a prompt's place in the batch; None: from the
                operating system.
            ignore_eos: the model's own stop tokens do not end it.
            slots: the layers to run, as positions in the loaded model, ascending: one list for
                all prompts, or one each; None: all.
            speculate: "ngram" guesses what follows from what was there before, and runs several
                tokens a step where that pays: the same text, faster where it repeats. How many it
                guesses follows the time that steps take, and steps of several tokens round
                otherwise: at near ties texts may part, from run to run too, whatever the seed.

        Returns:
            A `Generation`: text, token_ids, finish_reason ("stop" or "length"), prompt_tokens,
            timings.

        Raises:
            InputError: an option out of range, an empty prompt, ids outside the vocabulary, more
                tokens than the context holds.
        """
        options = Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            ignore_eos=ignore_eos,
            slots=slots,
            speculate=speculate,
        )
        prompts, batch = as_prompts(prompt)
        with self.locating_nan():
            results = generation.generate(self.runtime, self.text, prompts, options)
        return results if batch else results[0]

    def stream(
        self,
        prompt: Any,
        *,
        max_new_tokens: int = Options.max_new_tokens,
        temperature: float = Options.temperature,
        top_k: int = Options.top_k,
        top_p: float = Options.top_p,
        min_p: float = Options.min_p,
        repetition_penalty: float = Options.repetition_penalty,
        stop: Stop = Options.stop,
        seed: int | None = Options.seed,
        ignore_eos: bool = Options.ignore_eos,
        slots: Slots | None = Options.slots,
        speculate: str | None = Options.speculate,
    ) -> Iterator[str]:
        """The text of one prompt's completion, piece by piece as it becomes certain.

        The pieces, joined, are `Generation.text`. Takes what `generate` takes, for one prompt, and
        raises what it raises, before the first piece.
        """
        options = Options(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            ignore_eos=ignore_eos,
            slots=slots,
            speculate=speculate,
        )
        prompts, batch = as_prompts(prompt)
        if batch:
            raise InputError("stream: expected one prompt, found a list of them")
        pieces = generation.stream(self.runtime, self.text, prompts[0], options)
        return self._named(pieces)

    def _named(self, pieces: Iterator[str]) -> Iterator[str]:
        with self.locating_nan():
            yield from pieces

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> torch.Tensor:
        """Logits of every position, (B, T, V) float32, for ids (B, T) or (T,).

        `input_ids` are a list, an array, a tensor, or what a transformers tokenizer returns. Where
        `attention_mask` is 0 (left padding only) the ids are not run. The logits are on the
        runtime's device. InputError for ids beyond the vocabulary, padding that is not on the left,
        and more tokens than the context holds.
        """
        tokens = as_tokens(input_ids, attention_mask)
        cache = self.runtime.new_cache(tokens.shape[0], tokens.shape[1])
        return self.runtime.forward(tokens.to(self.runtime.device), cache, logits="all")


def load(
    ref: str | Path = DEFAULT.name,
    *,
    drop: str | Iterable[int] | Plan | None = None,
    keep: str | Iterable[int] | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    cache_dtype: str | None = None,
    isa: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Opens a model: a directory, a .gguf file, a hub id, or the default by name.

    `drop` and `keep` are layers of the checkpoint ("20-24", "3,7,21-25", or numbers), `drop` also
    a Plan; those not kept are never read. `backend` is "cpu", "triton", "cuda" or "reference"
    (plain torch, on either device): by default "cpu" on a CPU and "triton" on a GPU, "reference"
    where that has not the dtype or cannot run. `dtype` is torch.float32, float16 or bfloat16, or
    its name: by default the checkpoint's 16-bit one on a GPU, and on a CPU float32 but for what
    the backend "cpu" rounds, see below.

    The backends "triton" and "cuda" (our CUDA kernels where there are any, Triton's for the rest)
    take weights as they are stored, and so does "cpu". What it multiplies by quantized ones it
    rounds to 8 bits, and keys and values to 16, unless dtype is float32. `cache_dtype` ("float32",
    "float16", "int8"), `threads` (torch's number by default) and `isa` (by default the best set of
    instructions here, or another of `engine doctor`'s: of "amx", "avx512", "avxvnni", "avx2",
    "i8mm", "dotprod", "neon" and "generic") are for it alone. `device` is a torch device or its
    name, by default the GPU if there is one; `progress` is called with every layer's number as
    it is loaded.

    Raises `InputError` with one sentence for whatever the caller can mend, and a RuntimeError,
    `engine.kernels.dispatch.BackendUnavailable`, for a backend that cannot run here.
    """
    device = choose_device(device)
    backend = choose_backend(backend, device, dtype)
    path = locate(str(ref))
    checkpoint = open_checkpoint(path)
    config = choose_layers(checkpoint, drop, keep)
    if backend == "cpu":
        from engine.runtime.cpu import CpuRuntime, usual

        mode, keys_dtype = usual(exact=dtype is not None or not is_quantized(checkpoint))
        runtime: Runtime[CpuCache] = CpuRuntime.load(
            checkpoint,
            config,
            threads,
            mode=mode,
            cache_dtype=keys_dtype if cache_dtype is None else cache_dtype,
            isa=isa,
            progress=progress,
        )
        return Model(path, runtime)
    for option, given in (("threads", threads), ("cache_dtype", cache_dtype), ("isa", isa)):
        if given is not None:
            raise InputError(f"{option}: for the backend cpu alone, found {given!r} for {backend}")
    dtype = choose_dtype(dtype, checkpoint, device, backend)
    if backend in GPU_RUNTIMES:
        from engine.runtime.gpu import GpuRuntime

        gpu: Runtime[GpuCache] = GpuRuntime.load(
            checkpoint, config, device, dtype, backend, progress
        )
        return Model(path, gpu)

    from engine.runtime.reference import ReferenceRuntime

    oracle: Runtime[KVCache] = ReferenceRuntime.load(checkpoint, config, device, dtype, progress)
    return Model(path, oracle)


@overload
def generate(prompt: Prompt, ref: str | Path = ..., **options: Unpack[AskedOnce]) -> Generation: ...
@overload
def generate(
    prompt: list[str] | list[list[int]] | list[list[dict]],
    ref: str | Path = ...,
    **options: Unpack[AskedOnce],
) -> list[Generation]: ...
@overload
def generate(
    prompt: Any, ref: str | Path = ..., **options: Unpack[AskedOnce]
) -> Generation | list[Generation]: ...
def generate(
    prompt: Any,
    ref: str | Path = DEFAULT.name,
    *,
    drop: str | Iterable[int] | Plan | None = None,
    keep: str | Iterable[int] | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    cache_dtype: str | None = None,
    isa: str | None = None,
    max_new_tokens: int = Options.max_new_tokens,
    temperature: float = Options.temperature,
    top_k: int = Options.top_k,
    top_p: float = Options.top_p,
    min_p: float = Options.min_p,
    repetition_penalty: float = Options.repetition_penalty,
    stop: Stop = Options.stop,
    seed: int | None = Options.seed,
    ignore_eos: bool = Options.ignore_eos,
    slots: Slots | None = Options.slots,
    speculate: str | None = Options.speculate,
) -> Generation | list[Generation]:
    """One call from prompt to text: opens `ref`, completes `prompt`, closes the model.

    The options from `drop` to `isa` are those of `load`, the others of `Model.generate`.
    """
    opened = load(
        ref,
        drop=drop,
        keep=keep,
        backend=backend,
        dtype=dtype,
        device=device,
        threads=threads,
        cache_dtype=cache_dtype,
        isa=isa,
    )
    with opened as model:
        return model.generate(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            stop=stop,
            seed=seed,
            ignore_eos=ignore_eos,
            slots=slots,
            speculate=speculate,
        )


def choose_backend(
    name: str | None, device: torch.device, dtype: torch.dtype | str | None = None
) -> str:
    """The backend asked for; when None the best that runs on the device and has the dtype.

    InputError for a backend that is unknown, does not run on the device or has not the dtype;
    BackendUnavailable, with the reason, for one that cannot run here.
    """
    wanted = None if dtype is None else parse_dtype(dtype)
    check_backend(name, None if wanted is None else name_of(wanted))
    if name is None:
        best = "cpu" if device.type == "cpu" else "triton"
        exact = wanted in (None, torch.float32)
        fits = exact if best == "cpu" else wanted != torch.float32
        return best if fits and why_not(best, device) is None else "reference"
    elsewhere = "cpu" if name in GPU_RUNTIMES and torch.cuda.is_available() else "cuda"
    if name != "reference" and device.type == elsewhere:
        raise InputError(f"backend: {name} does not run on {device}")
    if name in GPU_RUNTIMES and device.type == "cuda" and (reason := no_gpu(device)):
        raise BackendUnavailable(f"backend {name}: {reason}")  # that GPU, not the present one
    return name


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = device
    try:
        device = torch.device(asked)
    except (RuntimeError, TypeError):
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected one like 'cpu' or 'cuda:0', found {asked!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device} was asked for, but {no_gpu()}")
    last = torch.cuda.device_count() - 1
    if device.type == "cuda" and device.index is not None and device.index > last:
        raise InputError(f"device: {device} was asked for, but the last is cuda:{last}")
    return device


def choose_dtype(
    dtype: torch.dtype | str | None,
    checkpoint: Checkpoint,
    device: torch.device,
    backend: str = "reference",
) -> torch.dtype:
    """The dtype asked for; else on a GPU the one that the config names, float16 where it names none
    of DTYPES, and float32 on a CPU.

    The GPU's kernels take a checkpoint of float32 in bfloat16, which has its range.
    """
    if dtype is not None:
        return parse_dtype(dtype)
    named = named_dtype(checkpoint.config)
    if backend in GPU_RUNTIMES:
        return torch.bfloat16 if named in ("bfloat16", "float32") else torch.float16
    if device.type == "cpu":
        return torch.float32
    return dtype_of(named) if named in DTYPES else torch.float16


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype or its name, one of DTYPES."""
    name = dtype if isinstance(dtype, str) else name_of(dtype)
    check_backend(None, name)
    return dtype_of(name)
