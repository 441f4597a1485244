"""A packed directory is written beside: killed runs go on, other runs begin anew."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from support import tiny
from support.directories import assert_same

from engine.checkpoint import open_checkpoint
from engine.errors import InputError
from engine.quantize import packing
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe


def _kill_after(files: int, path: Path, out: Path, samples, threads: int) -> None:
    """Runs in a process of its own, which does not survive.

    In as many threads as the runs that it is compared with: torch's sums depend on them.
    """
    torch.set_num_threads(threads)

    def progress(done: int, total: int) -> None:
        if done == files:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = open_checkpoint(path)
    pack(checkpoint, checkpoint.config, out, Recipe("gptq", group=16), samples, progress=progress)


@pytest.mark.parametrize("files", [1, 3, 4])
def test_a_killed_run_goes_on(files, source, tmp_path, rng, monkeypatch):
    checkpoint = source("llama")
    samples = torch.randint(3, tiny.VOCAB, (6, 24), generator=rng).tolist()
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    child = multiprocessing.get_context("spawn").Process(
        target=_kill_after, args=(files, checkpoint.path, out, samples, torch.get_num_threads())
    )
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL and not out.exists()
    assert len(list(partial.glob("*.safetensors"))) == files
    recipe, packed = Recipe("gptq", group=16), []
    original = packing.pack_layer
    monkeypatch.setattr(
        packing, "pack_layer", lambda *args: packed.append(args[2]) or original(*args)
    )
    pack(checkpoint, checkpoint.config, out, recipe, samples)
    assert packed == list(range(files, 4)) and not partial.exists()
    pack(checkpoint, checkpoint.config, tmp_path / "whole", recipe, samples)
    assert_same(out, tmp_path / "whole")


@pytest.mark.parametrize("change", ["recipe", "layers", "samples", "source"])
def test_another_run_begins_anew(change, source, tmp_path, rng):
    """What is left of a run with other settings is not taken for this one's."""
    checkpoint = source("llama")
    config, recipe = checkpoint.config.keep([0, 1, 2]), Recipe("gptq", group=16)
    samples = torch.randint(3, tiny.VOCAB, (6, 24), generator=rng).tolist()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, config, tmp_path / "out", recipe, samples, progress=stop)
    assert (tmp_path / "out.partial").is_dir()
    if change == "recipe":
        recipe = Recipe("gptq", group=32)
    elif change == "layers":
        config = checkpoint.config.keep([1, 2, 3])
    elif change == "samples":
        samples = samples[:-1]
    else:
        time.sleep(0.01)  # another time of change
        checkpoint = source("llama")
        config = checkpoint.config.keep([0, 1, 2])
    pack(checkpoint, config, tmp_path / "out", recipe, samples)
    pack(checkpoint, config, tmp_path / "whole", recipe, samples)
    assert_same(tmp_path / "out", tmp_path / "whole")


def test_a_finished_layer_that_is_gone(source, tmp_path, rng):
    checkpoint = source("llama")
    samples = torch.randint(3, tiny.VOCAB, (2, 24), generator=rng).tolist()
    recipe, out = Recipe("gptq", group=16), tmp_path / "out"

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint, checkpoint.config, out, recipe, samples, progress=stop)
    next((tmp_path / "out.partial").glob("model-00001-*")).unlink()
    with pytest.raises(InputError, match=r"model-00001-of-00005\.safetensors: is missing; remove"):
        pack(checkpoint, checkpoint.config, out, recipe, samples)
