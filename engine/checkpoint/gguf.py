"""GGUF files as checkpoints: Hugging Face names, and llama.cpp's changes to the weights undone."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engine.architecture.config import ModelConfig
from engine.architecture.families import FAMILIES, has_bias, outer_tensors, role_shape
from engine.architecture.hf_config import from_hf
from engine.checkpoint import gguf_names as stored
from engine.checkpoint.gguf_blocks import GgufBlocks, dequantize
from engine.checkpoint.gguf_config import config_from_gguf, family_of
from engine.checkpoint.gguf_file import GgufFile, GgufTensor
from engine.errors import InputError
from engine.kernels.dtypes import dtype_of

if TYPE_CHECKING:
    import torch

    from engine.kernels.w4.format import Spec

_LAYER_TENSOR = re.compile(r"blk\.(\d{1,6})\.(\w+)\.(weight|bias)", re.ASCII)


@dataclass(frozen=True)
class _Source:
    """How a tensor is stored: as `rows` rows of `tensor` from `first` on.

    `heads`: q and k rows are permuted within each of so many heads (0: they are not).
    `offset`: added to the stored values.
    """

    tensor: GgufTensor
    first: int
    rows: int
    heads: int = 0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.tensor.shape[1:])

    @property
    def stride_bytes(self) -> int:
        return self.tensor.nbytes // self.tensor.shape[0]


class GgufCheckpoint:
    """A GGUF file; a `Checkpoint`. `file.metadata` holds the vocabulary and the chat template."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = GgufFile(path)
        self.config = from_hf(config_from_gguf(self.file, family_of(self.file)), str(path))
        rows, tokens = self.config.vocab_size, self.file.metadata.count("tokenizer.ggml.tokens")
        if tokens > rows:
            raise InputError(
                f"{path}: tensor '{stored.EMBEDDING}.weight': expected a row for each of {tokens} "
                f"tokens, found {rows}"
            )
        self._sources: dict[str, _Source] = {}
        for name, source in _sources(self.file, self.config):
            if name in self._sources:
                raise InputError(f"{path}: two tensors stand for {name!r}")
            self._sources[name] = source

    def names(self) -> Collection[str]:
        return self._sources.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source(name).shape

    def dtype(self, name: str) -> str | None:
        return self._source(name).tensor.type.dtype

    def nbytes(self, name: str) -> int:
        source = self._source(name)
        return source.rows * source.stride_bytes

    def read(self, name: str) -> "torch.Tensor":
        source = self._source(name)
        kind, data = source.tensor.type, self._data(source)
        if kind.dtype is None:
            matrix = (data.numel() // source.tensor.row_bytes, source.tensor.shape[-1])
            values = dequantize(GgufBlocks(kind.name, matrix, data))
        else:
            values = data.view(dtype_of(kind.dtype))
        values = values.view(source.shape)
        return values.float() - source.offset if source.offset else values

    def packed(self, name: str) -> GgufBlocks | None:
        source = self._source(name)
        if source.tensor.type.dtype is not None or source.offset or len(source.shape) != 2:
            return None
        return GgufBlocks(source.tensor.type.name, source.shape, self._data(source))

    def spec(self, name: str) -> "Spec | None":
        from engine.kernels.w4.from_gguf import BLOCKS

        kind = self._source(name).tensor.type
        return BLOCKS[kind.name].spec if kind.dtype is None else None

    def forget(self) -> None:
        self.file.forget()

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            raise InputError(f"{self.path}: there is no tensor {name!r}")
        return self._sources[name]

    def _data(self, source: _Source) -> "torch.Tensor":
        """(rows, bytes) uint8 in Hugging Face's row order: a view, or a copy where permuted."""
        import torch

        begin = source.tensor.offset + source.first * source.stride_bytes
        data = self.file.data[begin : begin + source.rows * source.stride_bytes]
        if source.heads:
            # By numpy: torch would share so small a copy between threads, and wait for them.
            pairs = data.numpy().reshape(source.heads, -1, 2, source.stride_bytes)
            data = torch.from_numpy(pairs.swapaxes(1, 2).reshape(-1))
        return data.view(source.rows, source.stride_bytes)


def _sources(file: GgufFile, config: ModelConfig) -> Iterator[tuple[str, _Source]]:
    """(Hugging Face name, source) of every weight in the file."""
    family = FAMILIES[config.family]
    outer = {
        stored.EMBEDDING: "model.embed_tokens",
        stored.FINAL_NORM: family.final_norm,
        stored.HEAD: "lm_head",
    }
    roles = {stored.LAYER_NAMES[role]: role for role in family.names}
    known = {name for name, _ in outer_tensors(config).values()}
    for name, tensor in file.tensors.items():
        where = f"{file.path}: tensor {name!r}"
        if len(tensor.shape) == 1 and tensor.type.dtype is None:
            raise InputError(f"{where}: a vector quantized as {tensor.type.name} is not supported")
        stem, _, kind = name.rpartition(".")
        match = _LAYER_TENSOR.fullmatch(name)
        layer, leaf = (int(match[1]), match[2]) if match else (0, "")
        if name in stored.ROPE_TENSORS or leaf == stored.ROPE_LAYER_NAME:
            continue
        if layer >= config.total_layers:
            raise InputError(f"{where}: metadata says that there are {config.total_layers} layers")
        prefix = f"model.layers.{layer}."
        if stem in outer and kind in ("weight", "bias"):
            if kind == "bias" and f"{outer[stem]}.bias" not in known:
                raise _no_bias(config, where)
            offset = config.norm_offset if stem == stored.FINAL_NORM and kind == "weight" else 0.0
            yield f"{outer[stem]}.{kind}", _Source(tensor, 0, tensor.shape[0], offset=offset)
        elif leaf in roles:
            if kind == "bias" and not has_bias(config, roles[leaf]):
                raise _no_bias(config, where)
            source = _layer_source(file, config, roles[leaf], tensor, where)
            yield f"{prefix}{family.names[roles[leaf]]}.{kind}", source
        elif leaf == stored.LAYER_NAMES["qkv"] and "q" in family.names:
            if kind == "bias" and not all(has_bias(config, role) for role in "qkv"):
                raise _no_bias(config, where)
            for role, source in _split(file, config, tensor, where):
                yield f"{prefix}{family.names[role]}.{kind}", source
        else:
            raise InputError(f"{where}: a {config.family} model has no such tensor")


def _no_bias(config: ModelConfig, where: str) -> InputError:
    return InputError(f"{where}: this {config.family} model has no such bias")


def _interleaved(file: GgufFile, config: ModelConfig, role: str, rows: int, where: str) -> int:
    """Heads whose rows are stored for interleaved RoPE, also in a fused tensor; 0: none."""
    if file.metadata["general.architecture"] not in stored.PERMUTED:
        return 0
    heads = {"q": config.heads, "k": config.kv_heads}.get(role, 0)
    if heads and rows % (2 * heads):
        raise InputError(f"{where}: {rows} rows do not divide into {heads} heads")
    return heads


def _layer_source(
    file: GgufFile, config: ModelConfig, role: str, tensor: GgufTensor, where: str
) -> _Source:
    rows = tensor.shape[0]
    heads = _interleaved(file, config, role, rows, where)
    offset = config.norm_offset if role.endswith("norm") else 0.0
    return _Source(tensor, 0, rows, heads, offset)


def _split(
    file: GgufFile, config: ModelConfig, tensor: GgufTensor, where: str
) -> Iterator[tuple[str, _Source]]:
    """A fused attn_qkv of a family that keeps q, k and v apart: older Phi-2 files, and those of
    llama.cpp's converter with --fuse-qkv."""
    first, sizes = 0, {role: role_shape(config, role)[0] for role in "qkv"}
    if sum(sizes.values()) != tensor.shape[0]:
        raise InputError(f"{where}: expected {sum(sizes.values())} rows, found {tensor.shape[0]}")
    for role, rows in sizes.items():
        yield role, _Source(tensor, first, rows, _interleaved(file, config, role, rows, where))
        first += rows
