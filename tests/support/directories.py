"""Packed directories, compared tensor by tensor."""

from pathlib import Path

import torch

from engine.export.packed import read_shard
from engine.kernels.w4.format import Packed


def stored(directory: Path) -> dict[str, Packed | torch.Tensor]:
    shards = sorted(directory.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in read_shard(shard).items()}


def assert_same(first: Path, second: Path) -> None:
    """The same tensors and the same other files."""
    names = [sorted(path.name for path in directory.iterdir()) for directory in (first, second)]
    assert names[0] == names[1]
    ours, theirs = stored(first), stored(second)
    assert ours.keys() == theirs.keys()
    for name, matrix in ours.items():
        if isinstance(matrix, torch.Tensor):
            assert torch.equal(matrix, theirs[name]), name
        else:
            parts = theirs[name].tensors()
            assert matrix.spec == theirs[name].spec and matrix.tensors().keys() == parts.keys()
            assert all(torch.equal(t, parts[part]) for part, t in matrix.tensors().items()), name
