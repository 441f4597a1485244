"""Shallow: large language models with fewer layers and 4-bit weights, on kernels of our own.

    import engine

    model = engine.load("smollm2-135m", drop="20-24")
    print(model.generate("The capital of France is", max_new_tokens=16).text)

Nothing heavy is imported before the first call.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Model

__version__ = "0.1.0"
__all__ = ["generate", "load"]


def load(ref: str = "smollm2-135m", **options: Any) -> "Model":
    """Opens a model; see `engine.api.load` for the options (drop, keep, backend, dtype ...)."""
    from engine.api import load as open_model

    return open_model(ref, **options)


def generate(prompt: Any, ref: str = "smollm2-135m", **options: Any):
    """One call from prompt to text: loads `ref` and completes `prompt`; see `Model.generate`."""
    return load(ref).generate(prompt, **options)
