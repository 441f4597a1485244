"""The CPU runtime: a step of the whole decoder in one native call (csrc/cpu/decoder.h)."""

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from numbers import Integral
from typing import Any

import numpy as np
import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.checkpoint.gguf_blocks import GgufBlocks
from engine.checkpoint.weights import Stored, layer_weights, outer_weights
from engine.errors import InputError, NotFiniteError, check_choice
from engine.kernels import native
from engine.kernels.w4.cpu import MODES, CpuWeight, isas
from engine.kernels.w4.tiled import Tiled
from engine.options import Slots
from engine.reference.cache import Lengths, check_room
from engine.reference.decoder import (
    FOREIGN,
    IDS,
    check_cache,
    check_call,
    check_logits,
    mask_slots,
)
from engine.runtime import Times
from engine.runtime.angles import Angles, Tables
from engine.sample import NOT_FINITE
from engine.sample import threads as torch_threads

CACHE_DTYPES = ("float32", "float16", "int8")


class CpuCache(Lengths):
    """Keys and values in native pages; grows without copying."""

    def __init__(self, config: ModelConfig, pages: Any) -> None:
        super().__init__(config, pages.batch)
        self.pages = pages
        self.span = native.span(self.lengths)
        self.reach = 0  # at least the largest of `lengths`

    @property
    def nbytes(self) -> int:
        return self.pages.nbytes


class CpuRuntime:
    """The native decoder with its layers; activations between products are float32."""

    name = "cpu"
    device = torch.device("cpu")
    dtype = torch.float32
    prefill_chunk = 512

    def __init__(
        self,
        config: ModelConfig,
        decoder: Any,
        embedding: torch.Tensor | None = None,
        cache_dtype: str = "float16",
        mode: str = "int8",
        threads: int = 1,
        isa: str | None = None,
    ) -> None:
        """`decoder` is an engine._cpu.Decoder with all its layers; `embedding` (V, D) is memory
        that it borrows, None where it reads a matrix of its own."""
        self.config, self.decoder, self.embedding = config, decoder, embedding
        self.threads, self.isa = threads, isa
        self.cache_dtype = cache_dtype
        rounded = "float32" if mode == "exact" else "int8 activations"
        self.precision = f"{rounded}, {cache_dtype} cache"
        self._angles = Angles(config)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        threads: int | None = None,
        mode: str = "int8",
        cache_dtype: str = "float16",
        isa: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> "CpuRuntime":
        """Reads only the layers that `config` keeps; `progress` is called after each of them.

        `threads`: torch's number by default. `mode` "int8" rounds activations that meet quantized
        weights to 8 bits in blocks of 32, the coarsest of a norm's outputs twice, or as
        `engine.kernels.w4.cpu.matmul` does on avx2 and amx; "exact" keeps float32. `isa`: the best
        by default, else one of `isas()`.
        """
        threads = torch_threads() if threads is None else threads
        if isinstance(threads, bool) or not isinstance(threads, Integral) or threads < 1:
            raise InputError(f"threads: expected a whole number, at least 1, found {threads!r}")
        if threads > (most := native.load("cpu").pool_threads()):
            warnings.warn(
                f"threads: {threads} asked for, but the process may use {most} CPUs", stacklevel=2
            )
            threads = most
        threads = int(threads)
        check_choice("mode", mode, MODES)
        check_choice("cache dtype", cache_dtype, CACHE_DTYPES)
        if isa is None:
            isa = isas()[0]
            if isa == "generic":
                warnings.warn("no AVX2 here: the generic kernels run, far slower", stacklevel=2)
        check_choice("isa", isa, isas())
        decoder = native.load("cpu").Decoder(rules(config, mode), isa, threads)
        matrices, vectors, embedding = native_outer(checkpoint, config)
        rows, columns = (0, 0) if embedding is None else embedding.shape
        decoder.set_outer(
            matrices=matrices,
            vectors=spans(vectors),
            embedding=native.span(embedding),
            rows=rows,
            columns=columns,
        )
        checkpoint.forget()
        for entry in config.layers:
            matrices, vectors = native_layer(checkpoint, config, entry.layer)
            decoder.add_layer(
                matrices,
                spans(vectors),
                entry.window or 0,
                -1 if entry.rope is None else config.ropes.index(entry.rope),
                0 if entry.rope is None else entry.rope.dim,
            )
            checkpoint.forget()  # weights are in memory once
            if progress is not None:
                progress(entry.layer)
        return cls(config, decoder, embedding, cache_dtype, mode, threads, isa)

    @property
    def weight_bytes(self) -> int:
        return self.decoder.nbytes + (0 if self.embedding is None else self.embedding.nbytes)

    @property
    def weight_bytes_per_token(self) -> int:
        """Of what a step multiplies: of an embedding of its own it reads one row."""
        found: int = sum(self.decoder.times()["bytes"].values())
        return found

    def new_cache(self, batch: int, capacity: int | None = None) -> CpuCache:
        check_room(batch, capacity)
        cache = CpuCache(self.config, self.decoder.new_cache(self.cache_dtype, batch))
        cache.pages.reserve(min(capacity or 1, self.config.max_context))
        return cache

    def forward(
        self,
        tokens: torch.Tensor,
        cache: CpuCache,
        slots: Slots | None = None,
        logits: str = "last",
    ) -> torch.Tensor:
        check_logits(logits)
        check_cache(self.config, cache, CpuCache)
        if tokens.device.type != "cpu":
            raise InputError(f"tokens: expected a tensor on the CPU, found one on {tokens.device}")
        if tokens.ndim != 2 or tokens.dtype not in IDS:
            check_call(self.config, tokens, cache, slots)  # says what is wrong
        if tokens.dtype != torch.int64 or not tokens.is_contiguous():
            tokens = tokens.to(torch.int64).contiguous()
        chosen = None if slots is None else mask_slots(self.config, cache.batch, slots)
        batch, steps = tokens.shape
        everything = logits == "all"
        shape = batch, steps if everything else 1, self.config.vocab_size
        out = torch.empty(shape, dtype=torch.float32, device="cpu")  # whatever the defaults are
        angles = self._tables(tokens, cache)
        try:
            written = self.decoder.forward(
                cache.pages,
                native.span(tokens),
                batch,
                steps,
                cache.span,
                native.span(chosen),
                angles.spans,
                everything,
                native.span(out),
            )
        except ValueError as error:
            check_call(self.config, tokens, cache, slots)  # says what is wrong
            raise _refused(error) from None
        if written == out.shape[0] * out.shape[1]:
            return out
        shown = tokens if everything else tokens[:, -1:]
        padded = np.zeros(out.shape, np.float32)
        padded[shown.numpy() >= 0] = out.numpy().reshape(-1, out.shape[2])[:written]
        return torch.from_numpy(padded)

    def stream(
        self,
        tokens: torch.Tensor,
        cache: CpuCache,
        slots: Sequence[int],
        entering: torch.Tensor | None = None,
        logits: bool = False,
    ) -> torch.Tensor:
        """The residual stream (B, T, D) float32 of tokens (B, T), without padding, after `slots`,
        ascending; or its logits (B, T, V).

        `entering` is the stream before them, the embeddings where it is not given.
        """
        check_cache(self.config, cache, CpuCache)
        if bool((tokens < 0).any()):
            raise InputError("tokens: a stream is of tokens without padding, found negative ids")
        tokens = tokens.to(torch.int64).contiguous()
        chosen = torch.zeros_like(cache.lengths, dtype=torch.bool)
        chosen[:, list(slots)] = True
        if entering is not None:
            entering = entering.to(torch.float32).contiguous()
            assert entering.shape == (*tokens.shape, self.config.hidden_size)
        width = self.config.vocab_size if logits else self.config.hidden_size
        out = torch.empty(*tokens.shape, width, dtype=torch.float32, device="cpu")
        angles = self._tables(tokens, cache)  # held until the call has ended
        try:
            self.decoder.stream(
                cache.pages,
                native.span(tokens),
                *tokens.shape,
                cache.span,
                native.span(chosen),
                angles.spans,
                native.span(entering),
                native.span(None if logits else out),
                native.span(out if logits else None),
            )
        except ValueError as error:
            check_call(self.config, tokens, cache, list(slots))
            raise _refused(error) from None
        return out

    def greedy(self, tokens: Sequence[int], cache: CpuCache) -> list[int]:
        check_cache(self.config, cache, CpuCache)
        cache.reach += 1
        angles = self._angles.held
        if self.config.whole_prefill or cache.reach > angles.reach:
            angles = self._tables(torch.tensor(tokens, device="cpu")[:, None], cache)
        try:
            ids = self.decoder.greedy(cache.pages, tokens, cache.span, angles.spans)
        except ValueError as error:
            check_call(self.config, torch.tensor(tokens, device="cpu")[:, None], cache, None)
            raise _refused(error) from None
        if -1 in ids:
            raise NotFiniteError(NOT_FINITE)
        return ids

    def likeliest(self, tokens: torch.Tensor, cache: CpuCache) -> list[list[int]]:
        check_cache(self.config, cache, CpuCache)
        angles = self._tables(tokens, cache)
        try:
            ids = self.decoder.greedy(
                cache.pages, tokens.flatten().tolist(), cache.span, angles.spans, tokens.shape[1]
            )
        except ValueError as error:
            check_call(self.config, tokens, cache, None)
            raise _refused(error) from None
        if -1 in ids:
            raise NotFiniteError(NOT_FINITE)
        found = iter(ids)
        return [[*islice(found, count)] for count in (tokens >= 0).sum(1).tolist()]

    def measure(self, on: bool) -> None:
        self.decoder.measure(on)

    def times(self) -> Times:
        found = self.decoder.times()
        return Times(found["seconds"], found["bytes"], found["whole"])

    def kv_bytes(self, context: float) -> float:
        """Layers with a window read no more than it."""
        layers = self.config.layers
        page = native.load("cpu").KV_PAGE
        position_bytes = self.new_cache(1, page).nbytes / page / len(layers)
        return position_bytes * sum(min(context, layer.window or context) for layer in layers)

    def _tables(self, tokens: torch.Tensor, cache: CpuCache) -> Tables:
        """For the positions that the call reaches; an upper bound where that is all the same."""
        if self.config.whole_prefill:  # of the sequences that run
            if len(tokens) != cache.batch:
                check_call(self.config, tokens, cache, None)  # says so
            counts = (tokens >= 0).sum(1)
            cache.reach = int(torch.where(counts > 0, cache.positions + counts, 0).max())
            return self._angles.tables(cache.reach)
        cache.reach = int(cache.lengths.numpy().max()) + tokens.shape[1]
        held = self._angles.held  # Python is cold in every step: to look each table up took 25 us
        return held if cache.reach <= held.reach else self._angles.tables(cache.reach)


def usual(exact: bool) -> tuple[str, str]:
    """(mode, cache dtype) where nothing else is asked for; `exact`: float32 throughout."""
    return ("exact", "float32") if exact else ("int8", "float16")


def native_layer(
    checkpoint: Checkpoint, config: ModelConfig, layer: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(matrices, vectors) of one layer by role, as the native decoder takes them."""
    matrices, vectors = {}, {}
    for role, stored in layer_weights(checkpoint, config, layer):
        if len(stored.shape) == 1:
            vectors[role] = _vector(config, role, stored)
        else:
            matrices[role] = _tiles(checkpoint, stored, f"layer {layer}: {role}")
    return matrices, vectors


def native_outer(
    checkpoint: Checkpoint, config: ModelConfig
) -> tuple[dict[str, Any], dict[str, torch.Tensor], torch.Tensor | None]:
    """The same of what is not in a layer, and the embedding (V, D) where it is no matrix: rows of
    an embedding of its own are read, not multiplied."""
    matrices, vectors, embedding = {}, {}, None
    for role, stored in outer_weights(checkpoint, config):
        if len(stored.shape) == 1:
            vectors[role] = _vector(config, role, stored)
        elif role == "embedding" and not config.tied and isinstance(stored, torch.Tensor):
            embedding = stored.contiguous()
        else:
            matrices[role] = _tiles(checkpoint, stored, role)
            checkpoint.forget()  # before a head as large follows
    if config.tied:
        matrices["head"] = matrices["embedding"]
    return matrices, vectors, embedding


def _vector(config: ModelConfig, role: str, stored: torch.Tensor) -> torch.Tensor:
    vector = stored.float()
    return vector + config.norm_offset if role.endswith("norm") else vector


def _tiles(checkpoint: Checkpoint, stored: Stored, where: str) -> Any:
    """A matrix in the kernels' layout."""
    if isinstance(stored, torch.Tensor):
        return CpuWeight.from_tensor(stored).tiles
    if isinstance(stored, Tiled):
        return CpuWeight.from_tiled(stored).tiles
    if not isinstance(stored, GgufBlocks):
        return CpuWeight.from_packed(stored).tiles
    try:
        # An embedding may be most of a file: its pages go as they are read.
        weight = CpuWeight.from_blocks(
            stored.type,
            stored.shape,
            stored.data,
            f"{checkpoint.path}: {where}",
            read=checkpoint.forget,
        )
        return weight.tiles
    except ValueError as error:  # scales of NaN
        raise InputError(str(error)) from None


def rules(config: ModelConfig, mode: str) -> dict[str, Any]:
    """What the native decoder is told of a family."""
    names = """hidden_size vocab_size heads kv_heads head_dim ffn_size max_context norm norm_eps
    gated parallel activation attention_scale embedding_scale""".split()
    return {name: getattr(config, name) for name in names} | {
        "qk_norm": config.qk_norm or "",
        "attention_softcap": config.attention_softcap or 0.0,
        "logit_softcap": config.logit_softcap or 0.0,
        "mode": mode,
    }


def spans(vectors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Of float32 vectors, as the native decoder takes them."""
    return {role: native.span(vector) for role, vector in vectors.items()}


def _refused(error: ValueError) -> InputError:
    """What the native decoder says of a call that no rule of the protocol speaks of."""
    if str(error) == "cache":
        return InputError(FOREIGN)
    return InputError(f"the native decoder refuses the call: {error}")
