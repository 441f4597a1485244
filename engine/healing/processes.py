"""One of several processes that a launcher began (`accelerate launch`, torchrun): the first writes,
the others learn along. They share the file system."""

import os
from datetime import timedelta

import torch

from engine.errors import InputError

PATIENCE = timedelta(days=7)  # of the others, while the first one packs the base


def count() -> int:
    """By the variables that launchers of torch agree on."""
    return _number("WORLD_SIZE", 1)


def is_first() -> bool:
    return count() == 1 or _number("RANK", 0) == 0


def _number(name: str, default: int) -> int:
    found = os.environ.get(name, str(default))
    if not (found.isascii() and found.isdecimal() and len(found) < 7):
        raise InputError(f"{name}: expected a number, as launchers set it, found {found!r:.40}")
    return int(found)


def wait(device: torch.device | str) -> None:
    """Until all have come here."""
    if count() == 1:
        return
    try:
        from accelerate import PartialState
    except ImportError:
        raise InputError(
            "several processes take accelerate: pip install 'accelerate>=1.4'"
        ) from None
    cpu = torch.device(device).type == "cpu"
    given = {"backend": "gloo"} if cpu else {}
    PartialState(cpu=cpu, timeout=PATIENCE, **given).wait_for_everyone()


def check(methods: tuple[str, ...]) -> None:
    """InputError where a method cannot be shared by the processes there are."""
    if count() > 1 and methods[-1] != "qlora":
        raise InputError(
            f"method: of several processes qlora is the last method, found {methods[-1]} among "
            f"{count()}; begin it without a launcher"
        )
