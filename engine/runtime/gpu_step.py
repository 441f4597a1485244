"""A decode step on a GPU as a list of launches, built once for a bucket of sequences and a set of
slots: five a layer, the embedding, the head, the choice (kernels/layer/README.md).

All that a launch reads and writes lies in buffers that stay where they are; what changes from token
to token (ids, positions, who runs what, pages) is data in them. So the list is replayed: as a CUDA
graph on a GPU, by calls where kernels are interpreted.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
from triton import knobs
from triton.runtime.jit import KernelInterface

from engine.architecture.config import LayerConfig, ModelConfig
from engine.kernels import overlap
from engine.kernels.layer import attention, stream
from engine.kernels.layer import cuda as layer_cuda
from engine.kernels.w4 import cuda, fused, gemv, launch
from engine.kernels.w4.dequantize import Format
from engine.kernels.w4.fusion import PLAIN, Fusion
from engine.runtime.gpu_cache import PAGE
from engine.runtime.gpu_weights import Layer, Outer, Part, Projection

BUCKETS = (1, 2, 4, 8, 16, 32)  # sequences that a list is built for
BLOCK_D, BLOCK_V = 1024, 8192


@dataclass(frozen=True)
class Launch:
    """One kernel with all its arguments, and the bytes that it moves."""

    name: str
    kernel: Any  # Triton's, or a function
    grid: tuple[int, ...]  # of programs, or blocks
    arguments: tuple[Any, ...]
    options: dict[str, Any] = field(repr=False)
    weights: int = 0  # bytes read of matrices and vectors
    x: int = 0  # bytes of activations that all programs read
    parts: int = 0  # bytes of sums in parts, written and read again
    y: int = 0  # bytes written
    kv: int = 0  # bytes of keys and values read for every position of the context
    window: int | None = None  # positions read at most

    def __call__(self) -> None:
        run = self.kernel[self.grid] if isinstance(self.kernel, KernelInterface) else self.kernel
        run(*self.arguments, **self.options)

    def reads(self, context: int) -> int:
        """Bytes at so many positions."""
        seen = context if self.window is None else min(context, self.window)
        return self.weights + self.x + self.kv * seen


class Buffers:
    """What the lists of a bucket read and write, B sequences."""

    def __init__(
        self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype, cores: int
    ) -> None:
        """`cores`: multiprocessors, that the launches are to keep busy."""
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        width = -(-config.max_context // PAGE)

        def zeros(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=kind, device=device)

        self.batch, self.cores = batch, cores
        self.splits = splits = split_count(batch, config.kv_heads, cores)
        # What a token sends, in one copy: a uniform (two rows of 4 bytes), id, position, who runs.
        self.inputs = zeros(4 + len(config.layers), batch, kind=torch.int32)
        self.uniforms = self.inputs[:2].view(-1).view(torch.float64)
        self.tokens, self.positions, self.live = self.inputs[2], self.inputs[3], self.inputs[4:]
        self.table = zeros(batch, width, kind=torch.int32)
        self.streams = [zeros(batch, config.hidden_size, kind=torch.float32) for _ in range(2)]
        self.delta = zeros(batch, config.hidden_size, kind=torch.float32)
        self.qkv = zeros(batch, queries + 2 * keys)
        self.mixed = zeros(batch, queries)
        self.gate = zeros(batch, config.ffn_size, kind=torch.float32)
        self.widened = zeros(batch, config.ffn_size)
        self.logits = zeros(batch, config.vocab_size, kind=torch.float32)
        self.ids = zeros(batch, kind=torch.int32)
        rows, columns = blocks(config)
        parts = batch * config.kv_heads * splits * rows * (columns + 2) if splits > 1 else 0
        self.parts = zeros(parts, kind=torch.float32)
        self.counters = zeros(batch * config.kv_heads, kind=torch.int32)
        # What norms need of each stream, in as many parts as its writer had: (parts, 2, B).
        ranges = triton.cdiv(config.hidden_size, 16)
        self.sums = [zeros(ranges, 2, batch, kind=torch.float32) for _ in self.streams]
        self.scratch = zeros(0, kind=torch.float32)
        self.arrivals = zeros(0, kind=torch.int32)

    def reserve(self, values: int, arrivals: int) -> None:
        """Room in `scratch` and zeros in `arrivals`; launches keep what they were made with."""
        if values > len(self.scratch):
            self.scratch = self.scratch.new_empty(values)
        if arrivals > len(self.arrivals):
            self.arrivals = self.arrivals.new_zeros(arrivals)


def blocks(config: ModelConfig) -> tuple[int, int]:
    """Query heads of a group, and their width, as a tensor core takes them."""
    repeats = config.heads // config.kv_heads
    return max(16, triton.next_power_of_2(repeats)), max(
        16, triton.next_power_of_2(config.head_dim)
    )


class StepList:
    """The launches for `slots`, ascending, over `buffers`; keys and values in `store`."""

    def __init__(
        self,
        config: ModelConfig,
        outer: Outer,
        layers: Sequence[Layer],
        slots: Sequence[int],
        buffers: Buffers,
        store: torch.Tensor,
        angles: Sequence[torch.Tensor],
        overlaps: bool = False,
    ) -> None:
        """`angles` (C, dim) float32, cosines and sines, one for each of `config.ropes`.

        `overlaps`: a kernel may start while the one before it runs (kernels/overlap.py).
        """
        self.config, self.buffers, self.store = config, buffers, store
        self._overlaps = overlaps
        self.launches: list[Launch] = []
        self._stream, self._other = buffers.streams
        self._post: torch.Tensor | None = None  # norm that `delta` still has to pass
        # Of each stream: partial sums (of x squared, of x) that its last writer left; 0: none, and
        # who reads it sums anew.
        self._known = [0, 0]
        self._angles = angles
        self._embed(outer)
        for slot in slots:
            self._layer(slot, config.layers[slot], layers[slot])
        self._project(
            "head", outer.projections["head"], self._stream, buffers.logits,
            replace(self._normed(outer, "norm"), cap=config.logit_softcap or 0.0),
        )  # fmt: skip
        grid = (buffers.batch,)
        self._add("choice", stream.choose_kernel, grid, (buffers.logits, buffers.ids,
                  config.vocab_size), {"BLOCK_V": BLOCK_V, "num_warps": 16},
                  x=buffers.logits.nbytes, y=buffers.ids.nbytes)  # fmt: skip
        self.read = [(each.name, each.weights) for each in self.launches]  # bytes of weights
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, clock: "Clock | None" = None) -> None:
        """One step; captured by a GPU at the first call, unless a clock looks at each launch."""
        with torch.cuda.device_of(self.store):  # Triton launches on the current device
            if clock is not None:
                clock.run(self.launches)
            elif self.store.device.type != "cuda":
                for each in self.launches:
                    each()
            else:
                if self._graph is None:
                    self._graph = self._captured()
                self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        kept = self.buffers.inputs.clone()
        self.buffers.inputs.zero_()  # nobody runs: what is loaded and compiled leaves no trace
        for each in self.launches:
            each()
        torch.cuda.synchronize(self.store.device)
        graph = torch.cuda.CUDAGraph()
        # Torch's own stream for it is of the GPU that captured first.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.store.device)):
            for each in self.launches:
                each()
        self.buffers.inputs.copy_(kept)
        return graph

    def _add(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        options: dict[str, Any],
        **moved: Any,
    ) -> None:
        if isinstance(kernel, KernelInterface):
            options |= overlap.options(self._overlaps) | {"enable_fp_fusion": True}
        self.launches.append(Launch(name, kernel, grid, arguments, options, **moved))

    def _embed(self, outer: Outer) -> None:
        batch, d, factor = self.buffers.batch, self.config.hidden_size, self.config.embedding_scale
        tokens, x, matrix = self.buffers.tokens, self._stream, outer.embedding
        sums, moved = self.buffers.sums[0], {"y": x.nbytes}
        if isinstance(matrix, torch.Tensor):
            grid = (batch, triton.cdiv(d, BLOCK_D))
            moved["weights"] = batch * d * matrix.itemsize
            self._add(
                "embedding", stream.embed_plain_kernel, grid,
                (tokens, matrix, x, sums, factor, d), {"BLOCK_D": BLOCK_D}, **moved,
            )  # fmt: skip
        else:
            kind = fused.format_of(matrix, d, 1)
            grid = (batch, triton.cdiv(d, 16 * kind.chunk))
            moved["weights"] = batch * matrix.nbytes // matrix.shape[0]
            self._add(
                "embedding", stream.embed_kernel, grid,
                (tokens, *fused.pointers(matrix), matrix.perm, x, sums, factor, d),
                {
                    "FORMAT": kind, "DTYPE": fused.TRITON_TYPES[self.buffers.qkv.dtype],
                    "num_warps": 2,
                },
                **moved,
            )  # fmt: skip
        self._known[0] = grid[1]

    def _layer(self, slot: int, entry: LayerConfig, layer: Layer) -> None:
        config, buffers = self.config, self.buffers
        projections, back = layer.projections, Fusion(live=buffers.live[slot])
        normed = self._normed(layer, "attn_norm") if config.pre_norm else PLAIN
        self._project("qkv", projections["qkv"], self._stream, buffers.qkv, normed)
        before = self._stream
        self._attend(slot, entry, layer)
        self._return("o", projections["o"], buffers.mixed, layer, "attn_post_norm", back)
        if config.pre_norm and not config.parallel:
            normed = self._normed(layer, "mlp_norm")
        self._widen(projections, before if config.parallel else self._stream, normed)
        self._return("down", projections["down"], buffers.widened, layer, "mlp_post_norm", back)

    def _normed(self, layer: Layer, role: str) -> Fusion:
        weight, bias = layer.norms[role], layer.norms.get(f"{role}.bias")
        return Fusion(self.config.norm, self.config.norm_eps, weight, bias)

    def _return(
        self,
        name: str,
        projection: Projection,
        x: torch.Tensor,
        layer: Layer,
        post: str,
        back: Fusion,
    ) -> None:
        """x through a matrix back to the stream; by way of `delta` where a norm stands between."""
        if self.config.post_norm:
            self._project(name, projection, x, self.buffers.delta, back)
            self._post = layer.norms[post]
            return
        add = self._stream
        if self.config.parallel and name == "o":  # the mlp still reads what was before
            self._stream, self._other = self._other, self._stream
        self._project(name, projection, x, self._stream, replace(back, add=add))

    def _widen(self, projections: dict[str, Projection], x: torch.Tensor, normed: Fusion) -> None:
        buffers = self.buffers
        active = replace(normed, activation=self.config.activation)
        if not self.config.gated:
            self._project("up", projections["up"], x, buffers.widened, active)
            return
        both = projections["gate_up"]
        if len(both.parts) == 1:
            self._project("gate_up", both, x, buffers.widened, replace(active, gated=True))
            return
        gate, up = (Projection((part,), both.backend) for part in both.parts)
        reads_stream = x is self._stream
        self._project("gate", gate, x, buffers.gate, normed)
        x = self._stream if reads_stream else x
        self._project("up", up, x, buffers.widened, replace(active, gate=buffers.gate))

    def _project(
        self,
        name: str,
        projection: Projection,
        x: torch.Tensor,
        y: torch.Tensor,
        fusion: Fusion,
    ) -> None:
        """A launch for every part, whose outputs lie side by side in y.

        The first that reads the stream also adds what waits in `delta`.
        """
        first, written = 0, self._number(y)
        for part in projection.parts:
            whole, read = fusion, self._number(x)
            if x is self._stream and self._post is not None:
                whole = replace(
                    fusion, epsilon=self.config.norm_eps, delta=self.buffers.delta,
                    post=self._post, stream=self._other,
                )  # fmt: skip
                self._stream, self._other, self._post = self._other, self._stream, None
                read = self._number(self._stream)
                assert read is not None
                self._known[read] = 0
            outputs = part.matrix.shape[0] // 2 if fusion.gated else part.matrix.shape[0]
            columns = slice(first, first + outputs)
            beside = {
                name: tensor[:, columns]
                for name in ("gate", "add")
                if (tensor := getattr(whole, name)) is not None
            }
            whole, own = replace(whole, **beside), y[:, columns]
            self._multiply(name, projection.backend, part, x, own, whole, read, written)
            x = self._stream if whole.delta is not None else x
            first += outputs

    def _number(self, x: torch.Tensor) -> int | None:
        """Which of the two streams it is, None for others."""
        return next((i for i, each in enumerate(self.buffers.streams) if each is x), None)

    def _multiply(
        self,
        name: str,
        backend: str,
        part: Part,
        x: torch.Tensor,
        y: torch.Tensor,
        fusion: Fusion,
        read: int | None,
        written: int | None,
    ) -> None:
        """y = what stands around x @ W; `read` and `written` are the streams that x and y are."""
        matrix, dtype, buffers = part.matrix, self.buffers.qkv.dtype, self.buffers
        (n, k), m = matrix.shape, len(x)
        moved = {"weights": sum(t.nbytes for t in part.tensors), "y": y.numel() * y.itemsize}
        parts = self._known[read] if read is not None and fusion.norm else 0
        sums = buffers.sums[read][:parts] if read is not None and parts else None
        out_sums = None if written is None else buffers.sums[written]
        whole = x.nbytes * (_passes(fusion, known=parts > 0) - 1)  # that every program reads
        few = backend == "cuda" and m <= cuda.MAX_ROWS
        if few and not isinstance(matrix, torch.Tensor):
            stripes = launch.stripes(n, k, buffers.cores, fusion.gated)
            count = stripes.ranges * stripes.slices
            buffers.reserve(stripes.part_values(m), stripes.tiles)
            moved["parts"] = 2 * 4 * stripes.part_values(m)
            moved["x"] = stripes.ranges * x.nbytes * (1 if fusion.delta is None else 2)
            moved["x"] += count * (whole + parts * 2 * m * 4)
            call = cuda.describe(
                x, matrix, y, part.bias, fusion, dtype, sizes=stripes, parts=buffers.scratch,
                counters=buffers.arrivals, sums=sums, out_sums=out_sums, overlap=self._overlaps,
            )  # fmt: skip
            blocks = (stripes.ranges, stripes.slices)
            self._add(name, cuda.launch, blocks, (call, x.device), {}, **moved)
            if written is not None:
                self._known[written] = stripes.tiles
            return
        weights: tuple[torch.Tensor | None, ...] = (None,) * 5
        perm = None
        if isinstance(matrix, torch.Tensor):
            weights, kind = (matrix, *weights[1:]), plain_format()
        else:
            weights, perm, kind = fused.pointers(matrix), matrix.perm, fused.format_of(matrix, k, 1)
        sizes = launch.step(m, n, k, kind, buffers.cores, fusion.gated)
        grid = sizes.grid(m, n, k, kind, fusion.gated)
        values = sizes.part_values(m, grid)
        buffers.reserve(values, grid[0] * grid[2])
        moved["parts"] = 2 * 4 * values
        moved["x"] = grid[0] * (x.nbytes * (1 if fusion.delta is None else 2) + grid[1] * whole)
        moved["x"] += grid[0] * grid[1] * parts * 2 * m * 4
        self._add(
            name, gemv.gemv_kernel, grid,
            (x, *weights, part.bias, y, buffers.scratch, buffers.arrivals, m, n, k, x.stride(0),
             y.stride(0), sizes.TILES),
            {
                "FORMAT": kind,
                "DTYPE": fused.TRITON_TYPES[dtype],
                "GATED": fusion.gated,
                "perm_ptr": perm,
                "delta_ptr": fusion.delta,
                "post_ptr": fusion.post,
                "stream_ptr": fusion.stream,
                "norm_ptr": fusion.norm_weight,
                "norm_bias_ptr": fusion.norm_bias,
                "gate_ptr": fusion.gate,
                "add_ptr": fusion.add,
                "live_ptr": fusion.live,
                "sums_ptr": sums,
                "out_sums_ptr": out_sums,
                "ranges": parts,
                "epsilon": fusion.epsilon,
                "NORM": fusion.norm,
                "ACTIVATION": fusion.activation,
                "CAP": fusion.cap,
                **fused.gemv_options(sizes),
            },
            **moved,
        )  # fmt: skip
        if written is not None:
            self._known[written] = grid[0]

    def _attend(self, slot: int, entry: LayerConfig, layer: Layer) -> None:
        config, buffers = self.config, self.buffers
        grid = (buffers.batch, config.kv_heads, buffers.splits)
        angles = None if entry.rope is None else self._angles[config.ropes.index(entry.rope)]
        roles = ("q_norm", "q_norm.bias", "k_norm", "k_norm.bias")
        norms = tuple(layer.norms.get(role) for role in roles)
        repeats = config.heads // config.kv_heads
        moved = {
            "x": buffers.qkv.nbytes, "y": buffers.mixed.nbytes, "window": entry.window,
            "kv": 2 * config.kv_heads * config.head_dim * self.store.itemsize * buffers.batch,
        }  # fmt: skip
        ours = layer.projections["qkv"].backend == "cuda"
        if ours and layer_cuda.takes(repeats, config.head_dim):
            call = layer_cuda.describe(
                buffers.qkv, self.store, buffers.table, buffers.positions, buffers.live[slot],
                buffers.mixed, slot=slot, scale=config.attention_scale, angles=angles, norms=norms,
                norm=config.norm, scope=config.qk_norm or "", epsilon=config.norm_eps,
                window=entry.window or 0, cap=config.attention_softcap or 0.0,
                splits=buffers.splits, parts=buffers.parts, counters=buffers.counters,
                overlap=self._overlaps,
            )  # fmt: skip
            self._add("attention", layer_cuda.launch, grid, (call, self.store.device), {}, **moved)
            return
        rows, columns = blocks(config)
        self._add(
            "attention", attention.attention_kernel, grid,
            (
                buffers.qkv, self.store, buffers.table, buffers.positions, buffers.live[slot],
                angles, *norms, buffers.parts, buffers.counters, buffers.mixed, slot,
                buffers.table.shape[1], config.norm_eps, config.attention_scale,
            ),
            {
                "SLOTS": len(config.layers), "HEADS": config.heads, "KV_HEADS": config.kv_heads,
                "E": config.head_dim, "BLOCK_E": columns, "BLOCK_R": rows, "PAGE": PAGE,
                "ROPE": 0 if entry.rope is None else entry.rope.dim, "NORM": config.norm,
                "SCOPE": config.qk_norm or "", "WINDOW": entry.window or 0,
                "CAP": config.attention_softcap or 0.0, "SPLITS": buffers.splits,
                "WIDE": knobs.runtime.interpret, **launch.attention(columns),
            },
            **moved,
        )  # fmt: skip


class Clock:
    """How long launches of each name take, one after another outside of any graph."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._events = device.type == "cuda"

    def run(self, launches: Sequence[Launch]) -> None:
        marks = [self._mark()]
        for each in launches:
            each()
            marks.append(self._mark())
        if self._events:
            marks[-1].synchronize()
        for each, start, end in zip(launches, marks, marks[1:], strict=False):
            elapsed = start.elapsed_time(end) / 1e3 if self._events else end - start
            self.seconds[each.name] = self.seconds.get(each.name, 0.0) + elapsed

    def _mark(self) -> Any:
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def plain_format() -> Format:
    """Of a matrix that is not quantized."""
    return Format("plain", 16, 0, even=True, asm=not knobs.runtime.interpret)


def _passes(fusion: Fusion, known: bool) -> int:
    """How often a program reads x: for the product, and for each norm whose sums are not known."""
    return (
        1
        + (fusion.delta is not None)
        + 2 * (fusion.delta is not None and fusion.norm != "")
        + (fusion.delta is None and fusion.norm != "" and not known)
    )


def split_count(batch: int, kv_heads: int, cores: int) -> int:
    """Programs that share the context of a sequence's group of heads."""
    fair = launch.PROGRAMS_PER_CORE * cores // (batch * kv_heads)
    return max(1, min(fair, layer_cuda.MAX_SPLITS))
