"""The GPU runtime: our 4-bit kernels on packed weights, torch for the rest of the decoder."""

from collections.abc import Callable, Sequence

import torch

from engine.architecture.config import ModelConfig
from engine.checkpoint import Checkpoint
from engine.errors import InputError, NotFiniteError
from engine.kernels import overlap
from engine.kernels.dtypes import name_of
from engine.kernels.w4 import fused
from engine.options import Sampling, Slots
from engine.reference.cache import check_room
from engine.reference.decoder import FOREIGN, check_cache, check_call, check_logits
from engine.runtime import Times, too_many
from engine.runtime.angles import DeviceAngles
from engine.runtime.gpu_cache import Arena, GpuCache, free_bytes, within_memory
from engine.runtime.gpu_layers import ManyTokens
from engine.runtime.gpu_step import BUCKETS, Buffers, Clock, StepList
from engine.runtime.gpu_weights import Layer, Outer, Part, Placement, check_memory
from engine.sample import NOT_FINITE, draw

MOST_HEAD = 256  # values: a page of wider ones does not fit the shared memory of every GPU
KEPT_STEPS = 16  # step lists, by bucket and slots: each has a CUDA graph of its own
PARTS = {"gate_up": "up", "gate": "up"}  # of a step, by launch


class GpuRuntime:
    """The residual stream is float32, all else in `dtype`; a kernel's sums are float32."""

    prefill_chunk = 2048  # from 1,024 rows on weights are dequantized once a call
    most_sequences = BUCKETS[-1]

    def __init__(
        self,
        config: ModelConfig,
        placement: Placement,
        outer: Outer,
        layers: Sequence[Layer],
        overlaps: bool | None = None,
    ) -> None:
        """`overlaps`: the kernels of a step start while those before them run; where the device can
        by default."""
        self._overlaps = overlap.can(placement.device) if overlaps is None else overlaps
        self.config, self.name = config, placement.backend
        self.device, self.dtype = placement.device, placement.dtype
        self.outer, self.layers = outer, list(layers)
        self.arena = Arena(config, self.device, self.dtype)
        self.angles = DeviceAngles(config, self.device)
        self._many = ManyTokens(config, outer, self.layers, self.angles, self.dtype)
        self._buffers: dict[int, Buffers] = {}
        self._steps: dict[tuple[int, tuple[int, ...]], StepList] = {}
        self._built_on: tuple[int, int] = (0, 0)  # versions of arena and angles
        self._tabled: torch.Tensor | None = None  # the cache's table that buffers hold
        self._clock: Clock | None = None
        self._latest: Sequence[tuple[str, int]] = ()  # launches of a step, see StepList.read

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: ModelConfig,
        device: torch.device | str,
        dtype: torch.dtype,
        backend: str = "triton",
        progress: Callable[[int], None] | None = None,
    ) -> "GpuRuntime":
        """Reads only the layers that `config` keeps; `progress` is called after each of them.

        `backend` "cuda" takes our CUDA kernels where there are any and Triton's for the rest.
        """
        if dtype not in fused.HALVES:
            known = " and ".join(map(name_of, fused.HALVES))
            raise InputError(f"dtype: the backend {backend} has {known}, found {name_of(dtype)}")
        if config.head_dim > MOST_HEAD:
            raise InputError(
                f"head_dim: the backend {backend} has heads of at most {MOST_HEAD} values, found "
                f"{config.head_dim}; the backends reference and cpu have wider ones"
            )
        device = torch.empty(0, device=device).device  # "cuda" is the present one, by its number
        placement = Placement(device, dtype, backend)
        if placement.device.type == "cuda":
            free = free_bytes(placement.device)
            check_memory(checkpoint, config, free, str(placement.device))
        with within_memory(f"{checkpoint.path}: the model", placement.device):
            outer, layers = placement.outer(checkpoint, config), []
            for entry in config.layers:
                layers.append(placement.layer(checkpoint, config, entry.layer))
                if progress is not None:
                    progress(entry.layer)
            return cls(config, placement, outer, layers)

    @property
    def precision(self) -> str:
        return f"{name_of(self.dtype)}, float32 residual"

    @property
    def threads(self) -> int:
        return torch.get_num_threads()

    @property
    def weight_bytes(self) -> int:
        tensors = [t for layer in (self.outer, *self.layers) for t in layer.tensors]
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    @property
    def weight_bytes_per_token(self) -> int:
        """All but an embedding of its own, of which a token reads one row."""
        embedding = [] if self.config.tied else Part(self.outer.embedding).tensors
        return self.weight_bytes - sum(t.nbytes for t in embedding)

    def new_cache(self, batch: int, capacity: int | None = None) -> GpuCache:
        check_room(batch, capacity)
        cache = GpuCache(self.config, batch, self.arena)
        cache.reserve(min(capacity or 1, self.config.max_context))
        return cache

    @torch.no_grad()
    def forward(
        self,
        tokens: torch.Tensor,
        cache: GpuCache,
        slots: Slots | None = None,
        logits: str = "last",
    ) -> torch.Tensor:
        check_logits(logits)
        tokens = tokens.cpu() if tokens.is_cuda else tokens
        positions, chosen = self._begin(tokens, cache, slots)
        if tokens.shape[1] == 1:
            buffers = self._step(tokens, positions, chosen, cache)
            return buffers.logits[: cache.batch, None].clone()
        with within_memory("a call of {} x {} tokens".format(*tokens.shape), self.device):
            found = self._many(tokens, positions, chosen, cache, logits == "all")
        cache.advance(chosen, positions)
        return found

    @torch.no_grad()
    def greedy(self, tokens: Sequence[int], cache: GpuCache) -> list[int]:
        column = torch.tensor(tokens, device="cpu")[:, None]
        buffers = self._step(column, *self._begin(column, cache, None), cache)
        return _running(buffers.ids.tolist(), tokens)

    @torch.no_grad()
    def draw(
        self,
        tokens: Sequence[int],
        cache: GpuCache,
        sampling: Sampling,
        uniforms: Sequence[float],
    ) -> list[int]:
        column = torch.tensor(tokens, device="cpu")[:, None]
        buffers = self._step(column, *self._begin(column, cache, None), cache, uniforms)
        drawn = draw(buffers.logits, sampling, buffers.uniforms)
        return _running(torch.where(buffers.ids < 0, -1, drawn).tolist(), tokens)

    @property
    def launches_per_token(self) -> int | None:
        """Of the latest step; None before the first."""
        return len(self._latest) or None

    def measure(self, on: bool) -> None:
        self._clock = Clock(self.device) if on else None

    def times(self) -> Times:
        """By the names that the CPU's parts have; a gate and an up projection are one."""
        seconds: dict[str, float] = {}
        nbytes: dict[str, int] = {}
        for name, elapsed in ({} if self._clock is None else self._clock.seconds).items():
            part = PARTS.get(name, name)
            seconds[part] = seconds.get(part, 0.0) + elapsed
        for name, weights in self._latest:
            part = PARTS.get(name, name)
            nbytes[part] = nbytes.get(part, 0) + weights
        return Times(seconds, {name: n for name, n in nbytes.items() if n}, sum(seconds.values()))

    def kv_bytes(self, context: float) -> float:
        """Layers with a window read no more than it."""
        config = self.config
        position = 2 * config.kv_heads * config.head_dim * self.dtype.itemsize
        return position * sum(min(context, entry.window or context) for entry in config.layers)

    def _begin(
        self, tokens: torch.Tensor, cache: GpuCache, slots: Slots | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `check_call` gives for the call, which then has room."""
        check_cache(self.config, cache, GpuCache)
        if cache.arena is not self.arena:  # its pages are another's
            raise InputError(FOREIGN)
        positions, chosen = check_call(self.config, tokens, cache, slots)
        if tokens.shape[1] == 1 and cache.batch > self.most_sequences:
            raise InputError(too_many(self, cache.batch))
        length = int(positions.max()) + 1
        with within_memory(f"a context of {length} positions", self.device):
            cache.reserve(length)
            self.angles.reach(length)
        versions = self.arena.version, self.angles.version
        if versions != self._built_on:  # what the lists point to has moved, and is freed with them
            self._steps.clear()
            self._built_on = versions
        return positions, chosen

    def _step(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        chosen: torch.Tensor,
        cache: GpuCache,
        uniforms: Sequence[float] = (),
    ) -> Buffers:
        """Runs tokens and positions (B, 1), -1 where there is none; `chosen` (B, S): who runs what.

        The buffers hold logits and ids until the next step.
        """
        bucket = next(size for size in BUCKETS if size >= cache.batch)
        slots = tuple(chosen.any(dim=0).nonzero().flatten().tolist())
        launches = self._step_of(bucket, slots)
        buffers = self._buffers[bucket]
        host = torch.zeros(buffers.inputs.shape, dtype=torch.int32, device="cpu")
        host[:2].view(-1).view(torch.float64)[: len(uniforms)] = torch.tensor(
            uniforms, dtype=torch.float64, device="cpu"
        )
        host[2] = -1
        host[2, : cache.batch] = tokens[:, 0]
        host[3, : cache.batch] = positions[:, 0].clamp_min(0)
        host[4:, : cache.batch] = (chosen & (tokens >= 0)).T
        buffers.inputs.copy_(host)
        if self._tabled is not cache.table:
            buffers.table[: cache.batch, : cache.table.shape[1]] = cache.table
            self._tabled = cache.table
        with within_memory(f"a step of {bucket} sequences", self.device):  # what it compiles too
            launches.run(self._clock)
        self._latest = launches.read
        cache.advance(chosen, positions)
        return buffers

    def _step_of(self, bucket: int, slots: tuple[int, ...]) -> StepList:
        """Built once, and kept while it is among the latest."""
        found = self._steps.pop((bucket, slots), None)
        if found is None:
            with within_memory(f"a step of {bucket} sequences", self.device):
                found = self._build(bucket, slots)
        self._steps[bucket, slots] = found
        if len(self._steps) > KEPT_STEPS:
            del self._steps[next(iter(self._steps))]
        return found

    def _build(self, bucket: int, slots: tuple[int, ...]) -> StepList:
        if bucket not in self._buffers:
            cores = fused.limits(self.device)[0]
            self._buffers[bucket] = Buffers(self.config, bucket, self.device, self.dtype, cores)
            self._tabled = None
        return StepList(
            self.config, self.outer, self.layers, slots, self._buffers[bucket], self.arena.store,
            self.angles.tables, self._overlaps,
        )  # fmt: skip


def _running(ids: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Those of sequences that were fed a token; NotFiniteError for an id of -1 among them."""
    found = [id for id, token in zip(ids, tokens, strict=False) if token >= 0]
    if -1 in found:
        raise NotFiniteError(NOT_FINITE)
    return found
