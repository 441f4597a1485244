"""What stands behind the checks in Python all the same: the native decoder refuses by itself."""

import pytest
import torch
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.kernels import native

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import isas
from engine.runtime.cpu import addresses, native_layer, native_outer, rules


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.write("llama", path, 1)
    return open_checkpoint(path)


def decoder(config, **changes):
    return native.load("cpu").Decoder(rules(config, "exact") | changes, isas()[0], 1)


def set_outer(made, config, matrices, vectors, embedding) -> None:
    made.set_outer(matrices, addresses(vectors), embedding.data_ptr(), *embedding.shape, "float32")


@pytest.mark.parametrize("shape", [(-1, 0), (1, 0), (0, -1), (0, 1)])
def test_an_embedding_of_another_size(shape, checkpoint):
    config = checkpoint.config
    matrices, vectors, embedding = native_outer(checkpoint, config)
    other = torch.empty(embedding.shape[0] + shape[0], embedding.shape[1] + shape[1])
    with pytest.raises(ValueError, match="embedding (rows|columns): expected [0-9]+, found"):
        set_outer(decoder(config), config, matrices, vectors, other)
    set_outer(decoder(config), config, matrices, vectors, embedding)


def test_a_final_norm_that_is_absent(checkpoint):
    config = checkpoint.config
    matrices, _, embedding = native_outer(checkpoint, config)
    with pytest.raises(ValueError, match="no vector norm"):
        set_outer(decoder(config), config, matrices, {}, embedding)


@pytest.mark.parametrize("rule", ["head", "all"])
def test_norms_of_q_and_k_that_are_absent(rule, checkpoint):
    matrices, vectors = native_layer(checkpoint, checkpoint.config, 0)
    with pytest.raises(ValueError, match="no vector q_norm or k_norm"):
        decoder(checkpoint.config, qk_norm=rule).add_layer(matrices, addresses(vectors), 0, -1, 0)


@pytest.mark.parametrize("role", ["q", "k", "v", "o", "gate", "up", "down"])
def test_matrices_that_are_absent_or_of_another_size(role, checkpoint):
    matrices, vectors = native_layer(checkpoint, checkpoint.config, 0)
    made, vectors = decoder(checkpoint.config), addresses(vectors)
    with pytest.raises(ValueError, match=f"no matrix {role}"):
        made.add_layer({r: m for r, m in matrices.items() if r != role}, vectors, 0, -1, 0)
    other = decoder(checkpoint.config, hidden_size=32, ffn_size=32, heads=2, head_dim=8)
    with pytest.raises(ValueError, match="(outputs|inputs|norm): expected"):
        other.add_layer(matrices, vectors, 0, -1, 0)
