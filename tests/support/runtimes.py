"""The runtimes that can run on the machine at hand."""

from engine.kernels.dispatch import why_not
from engine.runtime import RUNTIMES

HERE = tuple(name for name in RUNTIMES if name == "reference" or why_not(name) is None)
