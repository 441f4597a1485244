"""Opening a model: its weights are in memory once, a packed directory's in its file alone."""

import subprocess
import sys

import shapes
import torch
from cases import Model

from engine.checkpoint import open_checkpoint
from engine.quantize.packing import pack
from engine.quantize.recipe import Recipe
from engine.runtime.cpu import CpuRuntime

PEAK = """
import sys
from pathlib import Path
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

def peak():  # ru_maxrss would be that of what started this process
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

checkpoint = open_checkpoint(Path(sys.argv[1]))
before = peak()
runtime = CpuRuntime.load(checkpoint, checkpoint.config)
print(peak() - before, runtime.weight_bytes)
"""


def test_weights_are_held_once(default_model):
    command = [sys.executable, "-c", PEAK, str(default_model)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    grown, weights = map(int, done.stdout.split())
    assert grown < 1.15 * weights


def test_an_embedding_that_is_most_of_a_file_is_held_once_too(default_model, monkeypatch, tmp_path):
    monkeypatch.setattr(shapes, "MODELS", {"Wide": Model(1, 2048, 128, 512)})
    monkeypatch.setattr(shapes, "SHAPES", {"Wide": ("Llama", 64, 50_000, True)})
    test_weights_are_held_once(shapes.write("Wide", tmp_path))


MAPPED = """
import sys
from pathlib import Path
import torch
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

checkpoint = open_checkpoint(Path(sys.argv[1]))
before = private()
runtime = CpuRuntime.load(checkpoint, checkpoint.config, 2)
opened = private() - before
logits = runtime.forward(torch.arange(40)[None], runtime.new_cache(1, 40))
assert logits.isfinite().all()
print(opened, runtime.weight_bytes)
"""


def test_a_packed_directory_is_multiplied_where_it_lies(default_model, tmp_path):
    """Nothing of it is copied, so that processes share the system's pages; its logits are the
    source's to the bit."""
    checkpoint = open_checkpoint(default_model)
    pack(checkpoint, checkpoint.config, tmp_path / "out", Recipe("keep", head=None))
    command = [sys.executable, "-c", MAPPED, str(tmp_path / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    copied, weights = map(int, done.stdout.split())
    assert copied < 0.05 * weights
    packed = open_checkpoint(tmp_path / "out")
    tokens = torch.randint(3, 1000, (1, 40))
    both = [CpuRuntime.load(each, each.config, 2) for each in (checkpoint, packed)]
    assert torch.equal(*(each.forward(tokens, each.new_cache(1, 40)) for each in both))
