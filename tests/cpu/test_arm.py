"""The decoder on 64-bit ARM: every family by every instruction set, under an emulator."""

import secrets
import subprocess

import pytest
import torch
from support import crossed, tiny
from support.close import assert_close
from support.mixed import MixedCheckpoint

from engine.checkpoint import open_checkpoint
from engine.kernels import native
from engine.kernels.w4.from_gguf import BLOCKS
from engine.runtime.reference import ReferenceRuntime

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)
if crossed.missing():
    pytest.skip(crossed.missing(), allow_module_level=True)

from engine.runtime.cpu import CpuRuntime

LENGTH = 70
ROWS = 6  # of two the RMS ratio had a tail: 0.039 once in 260 draws where 0.021 is the median
BOUNDS = {("exact", "float32"): 1e-4, ("int8", "float16"): 3e-2, ("int8", "int8"): 4e-2}


@pytest.fixture(scope="module")
def program():
    return crossed.build()


@pytest.fixture(scope="module", params=[*tiny.CASES, "blocks"])
def pair(request, tmp_path_factory):
    """(checkpoint of mixed weights, its reference runtime, their seed); "blocks": of
    every GGUF type."""
    path, seed = tmp_path_factory.mktemp("model"), secrets.randbits(32)
    if request.param == "blocks":
        tiny.write("llama", path, seed, **tiny.WIDE)
        checkpoint = MixedCheckpoint(open_checkpoint(path), kinds=tuple(BLOCKS))
    else:
        tiny.write(request.param, path, seed, spread=0.1)
        checkpoint = MixedCheckpoint(open_checkpoint(path))
    return checkpoint, ReferenceRuntime.load(checkpoint, checkpoint.config), seed


@pytest.mark.parametrize("isa", crossed.CPUS)
def test_the_best_is_chosen(program, isa):
    ran = subprocess.run(crossed.command(program, "best", crossed.CPUS[isa]), capture_output=True)
    assert ran.stdout.decode().split() == [isa]


@pytest.mark.parametrize("name", crossed.others())
def test_what_only_the_extension_has_compiles(name):
    """The rest of engine._cpu, which no emulator runs."""
    said = crossed.check(f'#include "cpu/{name}.cpp"\n')
    if said and "Python.h" in said:
        pytest.skip("Python's headers here are of its own processor alone")
    assert not said, said


@pytest.mark.parametrize(("mode", "cache_dtype"), BOUNDS)
@pytest.mark.parametrize("isa", crossed.CPUS)
def test_logits_of_every_family(pair, program, monkeypatch, rng, isa, mode, cache_dtype):
    """A prompt of some rows, one of them padded, one with slots of its own, then steps."""
    checkpoint, reference, seed = pair
    print(f"seed of the weights {seed}")
    ids = torch.randint(3, tiny.VOCAB, (ROWS, LENGTH), generator=rng)
    ids[1, :9] = -1
    monkeypatch.setattr(native.load("cpu"), "Decoder", crossed.decoders(program, isa))
    runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2, mode=mode, cache_dtype=cache_dtype)
    try:
        caches = reference.new_cache(ROWS), runtime.new_cache(ROWS)
        pieces = [ids[:, :40], *ids[:, 40:44].split(1, dim=1), ids[:, 44:]]
        expected, got = (
            torch.cat([each.forward(piece, cache, logits="all") for piece in pieces], dim=1)
            for each, cache in zip((reference, runtime), caches, strict=True)
        )
        assert_close(isa, expected[ids >= 0], got[ids >= 0], BOUNDS[mode, cache_dtype])
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        slots = [[0, 2]] + [list(range(len(checkpoint.config.layers)))] * (ROWS - 1)
        caches = reference.new_cache(ROWS), runtime.new_cache(ROWS)
        expected, got = (
            each.forward(ids, cache, slots, "all")
            for each, cache in zip((reference, runtime), caches, strict=True)
        )
        assert_close(f"{isa}, slots", expected[ids >= 0], got[ids >= 0], BOUNDS[mode, cache_dtype])
    finally:
        runtime.decoder.close()
