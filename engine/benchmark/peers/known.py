"""The peers by name: what runs them, how to get them, which settings may be the faster one."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InputError

Setting = Mapping[str, Any]


@dataclass(frozen=True)
class Known:
    adapter: str  # the module beside this one that the peer's process runs
    install: str
    settings: tuple[Setting, ...] = ({},)
    gguf_only: bool = True  # and whole models, one sequence at a time


# Wheels are built for older processors than the one at hand; ik's source package is broken.
KNOWN = {
    "llama.cpp": Known(
        "llama",
        'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary llama-cpp-python llama-cpp-python',
        ({"flash": True}, {"flash": False}),
    ),
    "ik": Known(
        "llama",
        "pip install ik-llama-cpp-python, or from source as benchmarks/peers.py says",
        ({"repack": True}, {"repack": False}),
    ),
    "openvino": Known(
        "genai", "pip install openvino-genai", ({"attention": "SDPA"}, {"attention": "PA"})
    ),
    "transformers": Known("hf", "pip install transformers", gguf_only=False),
}


def chosen(names: str, pythons: Iterable[str] = ()) -> dict[str, str | None]:
    """Peer -> the interpreter that has it (None: this one), of "ik,openvino" and "ik=PATH"."""
    found: dict[str, str | None] = {}
    for name in names.split(","):
        if name.strip() not in KNOWN:
            raise InputError(f"--compare knows {', '.join(KNOWN)}, not {name.strip()!r}")
        found[name.strip()] = None
    for given in pythons:
        name, _, python = given.partition("=")
        if name not in found or not python:
            raise InputError(
                f"--peer-python: expected NAME=PATH with a name of --compare, found {given!r}"
            )
        found[name] = python
    return found
