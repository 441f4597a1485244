"""Weights on a GPU: matrices that read one input side by side, each for the kernels of its kind."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from engine.architecture.config import ModelConfig
from engine.architecture.families import outer_tensors
from engine.checkpoint import Checkpoint
from engine.checkpoint.weights import Stored, layer_weights, outer_weights, packed_form
from engine.errors import InputError
from engine.kernels.w4 import cuda, fused
from engine.kernels.w4.format import SHARED, Packed, take, unpack
from engine.kernels.w4.layout_gpu import GpuMatrix, from_gpu, nbytes_of, to_gpu

Matrix = GpuMatrix | torch.Tensor  # quantized, or (N, K) in the dtype of activations
JOINED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # read one input


@dataclass(frozen=True, eq=False)
class Part:
    """One matrix (N, K) and its bias (N,), in the dtype of activations."""

    matrix: Matrix
    bias: torch.Tensor | None = None

    @property
    def tensors(self) -> list[torch.Tensor]:
        matrix = self.matrix
        held = [matrix] if isinstance(matrix, torch.Tensor) else [*matrix.tensors().values()]
        return held if self.bias is None else [*held, self.bias]


@dataclass(frozen=True, eq=False)
class Projection:
    """Matrices that read one x, their outputs side by side; one where their specs are equal."""

    parts: tuple[Part, ...]
    backend: str  # "triton" | "cuda": of 8 rows of x at most, where our CUDA kernel has them

    def __call__(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """x (..., K) -> (..., sum of N) in `dtype`: that of x (the default) or float32."""
        found = [self._multiply(x.reshape(-1, x.shape[-1]), part, dtype) for part in self.parts]
        y = found[0] if len(found) == 1 else torch.cat(found, dim=1)
        return y.view(*x.shape[:-1], y.shape[1])

    def _multiply(self, x: torch.Tensor, part: Part, dtype: torch.dtype | None) -> torch.Tensor:
        if isinstance(part.matrix, torch.Tensor):
            y = torch.nn.functional.linear(x, part.matrix, part.bias)
            return y if dtype is None else y.to(dtype)
        few = self.backend == "cuda" and len(x) <= cuda.MAX_ROWS
        multiply = cuda.matmul if few else fused.matmul
        return multiply(x, part.matrix, part.bias, out_dtype=dtype)


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: vectors are float32, norms with their offset."""

    projections: dict[str, Projection]  # "qkv", "o", "gate_up" or "up", "down"
    norms: dict[str, torch.Tensor]  # role -> (D,), "attn_norm.bias" too

    @property
    def tensors(self) -> list[torch.Tensor]:
        parts = (part for projection in self.projections.values() for part in projection.parts)
        return [*(tensor for part in parts for tensor in part.tensors), *self.norms.values()]


@dataclass(frozen=True, eq=False)
class Outer(Layer):
    """What is not in a layer; its one projection is the head."""

    embedding: Matrix

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [*super().tensors, *Part(self.embedding).tensors]


@dataclass(frozen=True)
class Placement:
    """Where weights go and what reads them there."""

    device: torch.device
    dtype: torch.dtype  # of activations, and of matrices that are not quantized
    backend: str

    def layer(self, checkpoint: Checkpoint, config: ModelConfig, layer: int) -> Layer:
        """Reads one layer, an original number."""
        stored = layer_weights(checkpoint, config, layer)
        return self._place(config, stored, f"{checkpoint.path}: layer {layer}")

    def outer(self, checkpoint: Checkpoint, config: ModelConfig) -> Outer:
        """A tied head shares the embedding's memory."""
        placed = self._place(config, outer_weights(checkpoint, config), str(checkpoint.path))
        (embedding,) = placed.projections.pop("embedding").parts
        head = placed.projections.get("head") or Projection((embedding,), self.backend)
        return Outer({"head": head}, placed.norms, embedding.matrix)

    def _place(
        self, config: ModelConfig, stored: Iterator[tuple[str, Stored]], where: str
    ) -> Layer:
        matrices: dict[str, Matrix] = {}
        biases: dict[str, torch.Tensor] = {}
        norms: dict[str, torch.Tensor] = {}
        for role, tensor in stored:
            owner = role.removesuffix(".bias")
            if len(tensor.shape) == 2:
                matrices[role] = self._matrix(tensor, f"{where}: {role}")
                continue
            assert isinstance(tensor, torch.Tensor)  # vectors are never quantized
            if owner.endswith("norm"):
                offset = config.norm_offset if owner == role else 0.0
                norms[role] = tensor.float().to(self.device) + offset
            else:
                biases[owner] = tensor.to(self.device, self.dtype)
        parts = {role: Part(matrix, biases.pop(role, None)) for role, matrix in matrices.items()}
        for role, bias in biases.items():  # of a tied head
            parts[role] = Part(matrices["embedding"], bias)
        return Layer(self._joined(parts), norms)

    def _joined(self, parts: dict[str, Part]) -> dict[str, Projection]:
        projections = {}
        for name, roles in JOINED.items():
            if all(role in parts for role in roles):
                beside = [parts.pop(role) for role in roles]
                projections[name] = Projection(tuple(stacked(beside)), self.backend)
        alone = {role: Projection((part,), self.backend) for role, part in parts.items()}
        return projections | alone

    def _matrix(self, stored: Stored, where: str) -> Matrix:
        if isinstance(stored, torch.Tensor):
            return stored.to(self.device, self.dtype)
        return to_gpu(packed_form(stored, where).to(self.device))


def stacked(parts: Sequence[Part]) -> list[Part]:
    """The same, neighbours that one kernel can read as one stacked along N."""
    found = [parts[0]]
    for part in parts[1:]:
        if alike(found[-1], part):
            found[-1] = stack(found[-1], part)
        else:
            found.append(part)
    return found


def alike(a: Part, b: Part) -> bool:
    """Whether one kernel reads both: one kind, one spec, one order of columns, biases or none."""
    if (a.bias is None) != (b.bias is None):
        return False
    if isinstance(a.matrix, torch.Tensor) or isinstance(b.matrix, torch.Tensor):
        return isinstance(a.matrix, torch.Tensor) and isinstance(b.matrix, torch.Tensor)
    ours, theirs = a.matrix.tensors(), b.matrix.tensors()
    return (
        a.matrix.spec == b.matrix.spec
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in SHARED if name in ours)
    )


def stack(a: Part, b: Part) -> Part:
    """Two that are `alike`, along N."""
    bias = None if a.bias is None or b.bias is None else torch.cat((a.bias, b.bias))
    if isinstance(a.matrix, torch.Tensor):
        assert isinstance(b.matrix, torch.Tensor)
        return Part(torch.cat((a.matrix, b.matrix)), bias)
    assert isinstance(b.matrix, GpuMatrix)
    ours, theirs = a.matrix.tensors(), b.matrix.tensors()
    joined = {
        name: ours[name] if name in SHARED else torch.cat((ours[name], theirs[name]))
        for name in ours
    }
    rows = a.matrix.shape[0] + b.matrix.shape[0]
    return Part(GpuMatrix(a.matrix.spec, (rows, a.matrix.shape[1]), **joined), bias)


def rows_of(matrix: Matrix, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (...,) int64 of a matrix: (..., K), float32 where it is quantized."""
    if isinstance(matrix, torch.Tensor):
        return matrix[ids]
    rows = take(matrix.tensors(), ids.flatten())
    packed: Packed = from_gpu(GpuMatrix(matrix.spec, (ids.numel(), matrix.shape[1]), **rows))
    return unpack(packed).view(*ids.shape, matrix.shape[1])


def check_memory(checkpoint: Checkpoint, config: ModelConfig, free: int, device: str) -> None:
    """InputError where the weights alone take more than `free` bytes; says how many layers fit."""
    outer = sum(_placed_bytes(checkpoint, name) for name, _ in outer_tensors(config).values())
    layers = [_layer_bytes(checkpoint, entry.layer) for entry in config.layers]
    if outer + sum(layers) <= free:
        return
    fitting = max(0, free - outer) // max(layers)
    raise InputError(
        f"{checkpoint.path}: the weights of {len(layers)} layers take "
        f"{(outer + sum(layers)) / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free: "
        + (f"{fitting} layers would fit" if fitting else "not one layer would fit")
    )


def _layer_bytes(checkpoint: Checkpoint, layer: int) -> int:
    prefix = f"model.layers.{layer}."
    names = (name for name in checkpoint.names() if name.startswith(prefix))
    return sum(_placed_bytes(checkpoint, name) for name in names)


def _placed_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Of a stored tensor; floats become 16 bits wide, as does what an adapter adds to."""
    shape = checkpoint.shape(name)
    if checkpoint.dtype(name) is not None:
        return 2 * math.prod(shape)
    spec = checkpoint.spec(name)  # GGUF's types of five and six bits become 8
    return checkpoint.nbytes(name) if spec is None else nbytes_of(spec, (shape[0], shape[1]))
