"""Which backends can run here, and why the others cannot."""

from importlib.util import find_spec

from engine.kernels import native


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


def why_not(backend: str) -> str | None:
    """Why "reference", "cpu", "triton" or "cuda" cannot run here; None when it can."""
    if backend == "reference":
        return None
    if backend in ("cpu", "cuda"):
        return native.error(backend)
    if backend != "triton":
        return f'there is no backend "{backend}"'
    if find_spec("triton") is None:
        return "the package triton is not installed"
    import torch
    from triton import knobs

    if not torch.cuda.is_available() and not knobs.runtime.interpret:
        return "torch finds no GPU"
    return None


def require(backend: str) -> None:
    """Raises BackendUnavailable where the backend cannot run."""
    if reason := why_not(backend):
        raise BackendUnavailable(f"backend {backend}: {reason}")
