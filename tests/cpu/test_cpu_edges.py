"""The CPU runtime against the reference at sizes that tiny models have not by themselves."""

import pytest
import torch
from support import tiny
from support.close import assert_close
from support.mixed import MixedCheckpoint

from engine.checkpoint import open_checkpoint
from engine.kernels import native
from engine.runtime.reference import ReferenceRuntime

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)

from engine.kernels.w4.cpu import isas
from engine.kernels.w4.format import Spec
from engine.runtime.cpu import CpuRuntime


def write(case: str, path, rng, spread: float = 0.1, **settings):
    """A tiny checkpoint; returns its model."""
    seed = int(torch.randint(1 << 31, (), generator=rng))
    return tiny.write(case, path, seed, spread=spread, **settings)


def steps(runtime, ids: torch.Tensor) -> torch.Tensor:
    cache = runtime.new_cache(len(ids))
    return torch.cat([runtime.forward(piece, cache) for piece in ids.split(1, dim=1)])


def assert_steps(checkpoint, isa: str, rng) -> None:
    """Of a prompt for many rows, then of a few and of one, which go by other ways."""
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    options = {"mode": "exact", "cache_dtype": "float32", "isa": isa}
    runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2, **options)
    caches = [each.new_cache(2) for each in (reference, runtime)]
    ids = torch.randint(3, tiny.VOCAB, (2, 40), generator=rng)
    for piece in ids.split([25, 1, 3, 11], dim=1):
        expected, got = (
            each.forward(piece, cache, logits="all")
            for each, cache in zip((reference, runtime), caches, strict=True)
        )
        assert_close(f"{piece.shape[1]} tokens", expected, got, 1e-4)


@pytest.mark.parametrize("isa", isas())
def test_more_heads_of_a_key_than_rows_that_attend_together(tmp_path, isa, rng):
    sizes = {"hidden_size": 128, "num_attention_heads": 128, "num_key_value_heads": 1}
    write("llama", tmp_path, rng, head_dim=16, **sizes)
    assert_steps(open_checkpoint(tmp_path), isa, rng)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ["llama", "phi2", "gemma2"])
def test_sizes_that_are_no_multiples_of_a_vector(tmp_path, case, isa, rng):
    """Where the tail of what one thread activates has the gates that another reads behind it."""
    sizes = {"hidden_size": 72, "intermediate_size": 27, "vocab_size": tiny.VOCAB + 3}
    write(case, tmp_path, rng, **sizes)
    checkpoint = open_checkpoint(tmp_path)
    assert_steps(checkpoint, isa, rng)
    ids = torch.randint(3, tiny.VOCAB, (1, 200), generator=rng)
    results = [
        steps(CpuRuntime.load(checkpoint, checkpoint.config, threads, isa=isa), ids)
        for threads in (1, 2)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("case", ["llama", "phi2", "gemma2"])
def test_activations_and_scores_whose_exponentials_overflow(tmp_path, case, isa, rng):
    model = write(case, tmp_path, rng)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in ("gate_proj", "fc1", *["q_proj"] * (case == "gemma2")):
                parameter.mul_(300)
    model.save_pretrained(tmp_path)
    assert_steps(open_checkpoint(tmp_path), isa, rng)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group", [16, 64, 128])
def test_inputs_that_threads_round_by_columns(tmp_path, group, permuted, threads, isa, rng):
    """Of `o` by heads, of `down` by claims: whole groups, and not where columns are permuted."""
    kinds = [Spec(4, group, "minimum"), Spec(8, group, "symmetric")]
    write("llama", tmp_path, rng, **tiny.WIDE | {"intermediate_size": 1024})
    checkpoint = MixedCheckpoint(open_checkpoint(tmp_path), permuted, kinds)
    reference = ReferenceRuntime.load(checkpoint, checkpoint.config)
    runtime = CpuRuntime.load(checkpoint, checkpoint.config, threads, mode="int8", isa=isa)
    ids = torch.randint(3, tiny.VOCAB, (6, 12), generator=rng)
    expected, got = (steps(each, ids) for each in (reference, runtime))
    assert_close("steps", expected, got, 3e-2)
