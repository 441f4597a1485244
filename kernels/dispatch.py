"""Which backends can run here, and why the others cannot."""

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

from engine.kernels import native

if TYPE_CHECKING:
    import torch

LEAST_CAPABILITY = (8, 0)  # of a GPU: bfloat16 in its tensor cores, asynchronous copies
CUDA_ROWS = 8  # of x that our CUDA matmul takes
TRITON_BOUNDARIES = 128  # of layers, that our Triton kernel of angular distances takes
BACKENDS = ("reference", "cpu", "triton", "cuda")
FEW_ROWS, MORE_ROWS = f"4-bit matmul, up to {CUDA_ROWS} rows", "4-bit matmul, more rows"
ANGULAR = "angular distances"
# Op -> kind of device that its tensors are on -> backends, the first that can run is taken.
OPS: dict[str, dict[str, tuple[str, ...]]] = {
    FEW_ROWS: {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")},
    MORE_ROWS: {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
    ANGULAR: {"cpu": ("cpu", "reference"), "cuda": ("triton", "reference")},
}


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def why_not(backend: str, device: "torch.device | None" = None) -> str | None:
    """Why "reference", "cpu", "triton" or "cuda" cannot run here, on a GPU that is not the present
    one where `device` says which; None when it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return native.error("cpu")
    if backend == "cuda":
        if (missing := native.error("cuda")) is not None:
            return missing
        return native.load("cuda").device_error() or no_gpu(device)
    if backend != "triton":
        return f'there is no backend "{backend}"'
    if find_spec("triton") is None:
        return "the package triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:
        return None
    return no_gpu(device) or _no_compiler()


def no_gpu(device: "torch.device | None" = None) -> str | None:
    """Why torch has no GPU that Triton compiles our kernels for, or `device` is none; None when it
    has."""
    import torch

    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # its words, where they help
            if "too old" in str(error):
                return "the NVIDIA driver is too old for this torch: a newer driver is needed"
        without = torch.version.cuda is None
        return "torch finds no GPU" + (": it was built without CUDA" if without else "")
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least, here = (".".join(map(str, version)) for version in (LEAST_CAPABILITY, found))
        name = torch.cuda.get_device_name(device)
        return f"{name} has compute capability {here}, {least} is the least"
    return None


def _no_compiler() -> str | None:
    """Why Triton cannot build the launcher of its kernels, in C; None when it can."""
    known = (os.environ.get("CC"), "cc", "gcc", "clang")
    if any(name and shutil.which(name) for name in known):
        return None
    return "triton builds its launcher with a C compiler, and there is none: install gcc"


def require(backend: str) -> None:
    """Raises BackendUnavailable where the backend cannot run."""
    if reason := why_not(backend):
        raise BackendUnavailable(f"backend {backend}: {reason}")


def choose(op: str, device: str) -> str:
    """The backend that `op`, one of OPS, takes by itself for tensors on "cpu" or "cuda"."""
    return next(backend for backend in OPS[op][device] if why_not(backend) is None)
