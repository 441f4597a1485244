"""What a decode step could reach on GPUs that are not here: a model of the list of launches.

    python benchmarks/roofline.py

Bytes and launches are counted, on the list that a runtime would replay (engine/runtime/gpu_step.py,
on meta tensors). Everything else is an assumption, below by name: this is no measurement.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.architecture.config import LayerConfig, ModelConfig, Rope
from engine.architecture.families import role_shape
from engine.kernels.w4.format import Spec, expected_tensors
from engine.kernels.w4.layout_gpu import GpuMatrix
from engine.runtime.gpu_cache import PAGE
from engine.runtime.gpu_step import Buffers, StepList
from engine.runtime.gpu_weights import JOINED, Layer, Outer, Part, Projection

META = torch.device("meta")
G128 = Spec(4, 128, "symmetric")


@dataclass(frozen=True)
class Gpu:
    read_gb_s: float  # of its memory, by its data sheet
    l2_gb_s: float  # assumed
    memory_gb: float


GPUS = {
    "A100 80 GB": Gpu(2039, 5000, 80),
    "H100 SXM": Gpu(3350, 7000, 80),
    "H200": Gpu(4800, 7000, 141),
    "RTX 4090": Gpu(1008, 4000, 24),
}
EFFICIENCY = 0.80  # assumed: of the read bandwidth within a kernel (Machete's GEMV: 78-80 %)
CORES = 132  # that launches are made for: an H100's
BOUNDARY_US = 1.3  # assumed: from kernel to kernel within a graph (measured by others on an H100)
CONTEXTS, BATCHES = (128, 2048, 8192), (1, 8)


def llama(hidden: int, ffn: int, heads: int, kv_heads: int, layers: int, vocab: int) -> ModelConfig:
    rope = Rope(5e5, hidden // heads)
    return ModelConfig(
        family="llama", architecture="LlamaForCausalLM", hidden_size=hidden, vocab_size=vocab,
        heads=heads, kv_heads=kv_heads, head_dim=hidden // heads, ffn_size=ffn, max_context=8192,
        total_layers=layers, layers=tuple(LayerConfig(n, rope=rope) for n in range(layers)),
    )  # fmt: skip


MODELS = {
    "Llama-3-8B": llama(4096, 14336, 32, 8, 32, 128256),
    "Llama-2-70B": llama(8192, 28672, 64, 8, 80, 32000),
    "Llama-2-70B, 40 layers": llama(8192, 28672, 64, 8, 40, 32000),
}


def matrix(n: int, k: int, spec: Spec) -> GpuMatrix:
    """Without memory."""
    tensors = {
        name: torch.empty(shape, dtype=dtype, device=META)
        for name, (shape, dtype) in expected_tensors(spec, (n, k)).items()
    }
    return GpuMatrix(spec, (n, k), **tensors)


def projection(*shapes: tuple[int, ...], spec: Spec, backend: str) -> Projection:
    return Projection(tuple(Part(matrix(n, k, spec)) for n, k in shapes), backend)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """(N, K) of a layer's matrices, by role."""
    return {role: role_shape(config, role) for role in ("q", "k", "v", "o", "gate", "up", "down")}


def layer(config: ModelConfig, stacked: bool, spec: Spec, backend: str) -> Layer:
    """`stacked`: q, k and v are one matrix, gate and up another."""
    shapes = shapes_of(config)
    projections = {}
    for name, roles in JOINED.items():
        rows = sum(shapes[role][0] for role in roles)
        whole: list[tuple[int, ...]] = [(rows, config.hidden_size)]
        parts = whole if stacked else [shapes[role] for role in roles]
        projections[name] = projection(*parts, spec=spec, backend=backend)
    projections |= {
        role: projection(shapes[role], spec=spec, backend=backend) for role in ("o", "down")
    }
    roles = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm")
    return Layer(
        projections, {role: torch.empty(config.hidden_size, device=META) for role in roles}
    )


def step(
    config: ModelConfig,
    batch: int = 1,
    slots: Sequence[int] | None = None,
    stacked: bool = True,
    spec: Spec = G128,
    backend: str = "triton",
    overlaps: bool = False,
) -> StepList:
    """The list of a model of these shapes, its head in 4 bits, its embedding in float16."""
    shape = config.vocab_size, config.hidden_size
    norm = {"norm": torch.empty(config.hidden_size, device=META)}
    embedding = torch.empty(shape, dtype=torch.float16, device=META)
    head = projection(shape, spec=spec, backend=backend)
    outer = Outer({"head": head}, norm, embedding)
    layers = [layer(config, stacked, spec, backend)] * len(config.layers)
    buffers = Buffers(config, batch, META, torch.bfloat16, CORES)
    pages = (1, len(layers), 2, config.kv_heads, PAGE, config.head_dim)
    store = torch.empty(pages, dtype=torch.bfloat16, device=META)
    angles = [torch.empty(config.max_context, config.head_dim, device=META)]
    slots = range(len(layers)) if slots is None else slots
    return StepList(config, outer, layers, slots, buffers, store, angles, overlaps)


def step_us(launches: StepList, gpu: Gpu, context: int) -> float:
    """A kernel takes as long as its memory or, with what its programs read again, its L2."""
    total = 0.0
    for each in launches.launches:
        moved = each.reads(context) - each.x + each.y
        slower = max(moved / gpu.read_gb_s, (moved + each.x + each.parts) / gpu.l2_gb_s)
        total += slower / EFFICIENCY / 1e3 + BOUNDARY_US
    return total


def cell(launches: StepList, batch: int, gpu: Gpu, context: int) -> str:
    """Tokens a second; "-" where weights, keys and values do not fit."""
    held = sum(each.reads(context) - each.x for each in launches.launches)
    if held > gpu.memory_gb * 1e9:
        return "-"
    return f"{batch * 1e6 / step_us(launches, gpu, context):,.0f}"


def main() -> None:
    print(
        f"Assumed: {EFFICIENCY:.0%} of the bandwidth within a kernel, {BOUNDARY_US} us a boundary"
    )
    print("L2: " + ", ".join(f"{gpu.l2_gb_s:,} GB/s ({name})" for name, gpu in GPUS.items()))
    print("\n| model | batch | context | " + " | ".join(GPUS) + " |")
    print("|---|---|---|" + "---|" * len(GPUS))
    for name, config in MODELS.items():
        for batch in BATCHES:
            launches = step(config, batch)
            for context in CONTEXTS:
                cells = [cell(launches, batch, gpu, context) for gpu in GPUS.values()]
                print(f"| {name} | {batch} | {context:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
