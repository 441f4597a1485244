"""`import engine` as a backend: a loaded model that generates, streams and gives logits."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from engine import generation
from engine.architecture.config import ModelConfig
from engine.architecture.layers import kept_layers
from engine.artifacts import Plan
from engine.checkpoint import Checkpoint, open_checkpoint
from engine.checkpoint.locate import locate
from engine.checkpoint.weights import is_quantised, lineage_hash
from engine.errors import InputError
from engine.kernels.dispatch import why_not
from engine.kernels.dtypes import DTYPES, dtype_of, name_of
from engine.runtime import Runtime, check_backend
from engine.text import Text, load_text


class Model:
    """A runtime and the text side of its checkpoint. Made by `load`."""

    def __init__(self, path: Path, runtime: Runtime) -> None:
        self.path, self.runtime = path, runtime

    @property
    def config(self) -> ModelConfig:
        return self.runtime.config

    @cached_property
    def text(self) -> Text:
        """The light tokenizer, read from the checkpoint on first use."""
        return load_text(self.path)

    @cached_property
    def tokenizer(self):
        """A transformers tokenizer, made on first use (its import takes a second or more)."""
        return self.text.to_transformers()

    def generate(self, prompt: Any, **options: Any):
        """Completes a prompt, or each of a list of prompts (a list in gives a list out).

        A string is raw text, a list of `{"role", "content"}` messages goes through the chat
        template. Options and defaults: max_new_tokens=128, temperature=0.0 (greedy), top_k=0,
        top_p=1.0, min_p=0.0, repetition_penalty=1.0, stop=() (strings or token ids), seed=None,
        ignore_eos=False, slots=None. Returns a `Generation`: text, token_ids, finish_reason,
        prompt_tokens, timings.
        """
        batch = _is_batch(prompt)
        prompts = list(prompt) if batch else [prompt]
        results = generation.generate(self.runtime, self.text, prompts, _options(options))
        return results if batch else results[0]

    def stream(self, prompt: Any, **options: Any) -> Iterator[str]:
        """The same for one prompt, as an iterator over pieces of text as they become certain."""
        if _is_batch(prompt):
            raise InputError("stream: expected one prompt, found a list of them")
        return generation.stream(self.runtime, self.text, prompt, _options(options))

    def __call__(self, input_ids: Any, attention_mask: Any = None) -> torch.Tensor:
        """Logits of every position, (B, T, V) float32, for ids (B, T) or (T,).

        Where `attention_mask` is 0 (left padding only) the ids are not run.
        """
        tokens = torch.as_tensor(input_ids, dtype=torch.int64)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if bool((tokens < 0).any()):
            raise InputError(f"input_ids: expected no negative ids, found {int(tokens.min())}")
        if attention_mask is not None:
            mask = torch.as_tensor(attention_mask).reshape(tokens.shape)
            tokens = tokens.masked_fill(mask == 0, -1)
        cache = self.runtime.new_cache(tokens.shape[0], tokens.shape[1])
        return self.runtime.forward(tokens.to(self.runtime.device), cache, logits="all")


def load(
    ref: str | Path = "smollm2-135m",
    *,
    drop: str | Iterable[int] | Plan | None = None,
    keep: str | Iterable[int] | None = None,
    backend: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    threads: int | None = None,
    cache_dtype: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Model:
    """Opens a model: a directory, a .gguf file, a hub id, or the default by name.

    `drop` and `keep` are layers of the checkpoint ("20-24", "3,7,21-25", or numbers), `drop` also
    a Plan; those not kept are never read. `backend` is one of RUNTIMES: by default "cpu" on a CPU,
    "reference" on a GPU, for another dtype than float32, and where the extension is not built.
    `dtype` is a torch dtype or its name: by default the checkpoint's on a GPU, float32 on a CPU.

    The backend "cpu" takes weights as they are stored. What it multiplies by quantised ones it
    rounds to 8 bits, and keys and values to 16, unless dtype is float32. `cache_dtype` ("float32",
    "float16", "int8") and `threads` (torch's number by default) are for it alone.

    Raises `InputError` with one sentence for whatever the caller can mend.
    """
    device = choose_device(device)
    backend = choose_backend(backend, device, dtype)
    path = locate(str(ref))
    checkpoint = open_checkpoint(path)
    config = choose_layers(checkpoint, drop, keep)
    if backend == "cpu":
        from engine.runtime.cpu import CpuRuntime

        exact = dtype is not None or not is_quantised(checkpoint)
        runtime = CpuRuntime.load(
            checkpoint,
            config,
            threads,
            mode="exact" if exact else "int8",
            cache_dtype=cache_dtype or ("float32" if exact else "float16"),
            progress=progress,
        )
        return Model(path, runtime)
    for option, given in (("threads", threads), ("cache_dtype", cache_dtype)):
        if given is not None:
            raise InputError(f"{option}: for the backend cpu alone, found {given!r} for {backend}")
    dtype = choose_dtype(dtype, checkpoint, device)

    from engine.runtime.reference import ReferenceRuntime

    return Model(path, ReferenceRuntime.load(checkpoint, config, device, dtype, progress))


def choose_layers(
    checkpoint: Checkpoint,
    drop: str | Iterable[int] | Plan | None = None,
    keep: str | Iterable[int] | None = None,
) -> ModelConfig:
    """The checkpoint's config with the layers that stay.

    A Plan made on another architecture is an InputError; on other weights of the same one, a
    warning. Bits do not matter: a plan made on 16-bit weights drives a 4-bit copy.
    """
    config = checkpoint.config
    if not isinstance(drop, Plan):
        return config.keep(kept_layers(config.total_layers, drop, keep))
    if keep is not None:
        raise InputError("a plan and keep exclude each other; give one of them")
    if drop.architecture != config.architecture_hash:
        raise InputError(
            f"the plan was made for {drop.model}, whose layers have other shapes than those of "
            f"{checkpoint.path}"
        )
    if drop.lineage != lineage_hash(checkpoint, config):
        warnings.warn(
            f"the plan was made on other weights ({drop.model}) than {checkpoint.path} holds",
            stacklevel=2,
        )
    return config.keep(drop.keep)


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
        exact = wanted in (None, torch.float32)
        return "cpu" if device.type == "cpu" and exact and why_not("cpu") is None else "reference"
    if name == "cpu" and device.type != "cpu":
        raise InputError(f"backend: cpu does not run on {device}")
    return name


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, else the first GPU, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: expected one like 'cpu' or 'cuda:0', found {device!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device: {device} was asked for, but torch finds no GPU")
    return device


def choose_dtype(
    dtype: torch.dtype | str | None, checkpoint: Checkpoint, device: torch.device
) -> torch.dtype:
    """The dtype asked for; else the checkpoint's 16-bit one on a GPU, float32 on a CPU."""
    if dtype is None:
        source = checkpoint.config.source
        stored = str(source.get("dtype") or source.get("torch_dtype")).removeprefix("torch.")
        known = stored if stored in DTYPES else "float16"
        return torch.float32 if device.type == "cpu" else dtype_of(known)
    return parse_dtype(dtype)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A torch dtype or its name, one of DTYPES."""
    name = dtype if isinstance(dtype, str) else name_of(dtype)
    check_backend(None, name)
    return dtype_of(name)


def _is_batch(prompt: Any) -> bool:
    """A list of prompts, as opposed to one string, one list of messages or one list of ids."""
    return (
        isinstance(prompt, Sequence)
        and not isinstance(prompt, str)
        and (len(prompt) == 0 or not isinstance(prompt[0], dict | int))
    )


def _options(options: dict[str, Any]) -> generation.Options:
    known = generation.Options.__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InputError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}")
    return generation.Options(**options)
