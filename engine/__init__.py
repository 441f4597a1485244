"""Shallow: large language models with fewer layers and 4-bit weights, on kernels of our own.

    import engine

    with engine.load("smollm2-135m") as model:
        print(model.generate([{"role": "user", "content": "Name the capital of France."}]).text)

`load` opens a model, `generate` is one call from prompt to text; `Model`, `Generation` and
`InputError` are what they give and raise. Nothing heavy is imported before one of them is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.api import Model, generate, load
    from engine.errors import InputError
    from engine.generation import Generation

__version__ = "0.1.0"
__all__ = ["Generation", "InputError", "Model", "generate", "load"]

_HOMES = {
    "Generation": "engine.generation",
    "InputError": "engine.errors",
    "Model": "engine.api",
    "generate": "engine.api",
    "load": "engine.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
