"""The CPU runtime in a program that goes on for long: threads that share a model, and its end."""

import subprocess
import sys

import pytest
from support import tiny

from engine.checkpoint import open_checkpoint
from engine.kernels import native
from engine.runtime.angles import Angles

if native.error("cpu") is not None:
    pytest.skip(f"engine._cpu does not load: {native.error('cpu')}", allow_module_level=True)


class Overtaken(Angles):
    """Whose last tables are let go, by which torch lets other threads run: one asks for its own."""

    @property
    def held(self):
        return self._held

    @held.setter
    def held(self, tables):
        self._held, overtaken = tables, getattr(self, "_overtaken", True)
        self._overtaken = True
        if not overtaken:
            self.tables(50)


def test_angles_of_a_length_are_not_those_that_another_thread_asked_for(tmp_path):
    tiny.write("llama-dynamic", tmp_path, 1)
    config = open_checkpoint(tmp_path).config
    (expected,), angles = Angles(config).tables(90).tables, Overtaken(config)
    angles._overtaken = False
    (found,) = angles.tables(90).tables
    assert found.equal(expected)
    assert not angles.held.tables[0].equal(expected)


DAEMONS = """
import threading, time
from engine.kernels import native

cpu = native.load("cpu")

def work():
    while True:
        cpu.int8_peak(cpu.isas()[0], 1, 1)

for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
"""


def test_a_program_ends_while_daemon_threads_are_in_kernels():
    """Not in torch's, whose own guards end such a program by SIGABRT."""
    for _ in range(3):
        ended = subprocess.run(
            [sys.executable, "-c", DAEMONS], timeout=120, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr
