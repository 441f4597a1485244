"""The compiled extensions `engine._cpu` and `engine._cuda`, each loaded once, on first use."""

from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def _load(name: str) -> ModuleType | str:
    """The module `engine._<name>`, or the reason why it does not load."""
    try:
        return import_module(f"engine._{name}")
    except ImportError as error:
        return str(error)


def load(name: str) -> ModuleType:
    """The extension "cpu" or "cuda"; ImportError with the first attempt's reason."""
    found = _load(name)
    if isinstance(found, str):
        raise ImportError(f"engine._{name} does not load: {found}")
    return found


def error(name: str) -> str | None:
    """Why the extension "cpu" or "cuda" does not load; None when it does."""
    found = _load(name)
    return found if isinstance(found, str) else None
