"""Opening a model: its weights are in memory once, whatever the file holds them as."""

import subprocess
import sys

PEAK = """
import resource, sys
from pathlib import Path
from engine.checkpoint import open_checkpoint
from engine.runtime.cpu import CpuRuntime

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

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
