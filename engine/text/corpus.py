"""Text to calibrate on and to measure with."""

import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from engine.errors import InputError


def read_text_file(path: str | Path) -> str:
    """The file's text, line ends as they are; InputError if missing, empty or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode()
    except OSError as error:
        raise InputError(f"{path}: expected a text file, found none ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: expected UTF-8 text, found byte 0x{error.object[error.start]:02x}"
            f" at offset {error.start}"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: expected text, found an empty file")
    return text


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, counted from 1, what it holds) of the lines that are not blank."""
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: not valid JSON ({error})") from error
        yield number, row


def default_text() -> str:
    """About 200 kB of public-domain prose, for calibration where the user gives no text."""
    return (files("engine") / "data" / "prose.txt").read_text(encoding="utf-8")


def mixed_text() -> str:
    """Prose, handbook and code, 45 to 48 kB of each: what quantizers are calibrated on by default.

    Calibrated on one kind of text alone, GPTQ loses more on the others.
    """
    data = files("engine") / "data"
    kinds = [(data / name).read_text(encoding="utf-8") for name in ("handbook.txt", "code.txt")]
    return "\n\n".join([default_text()[:48_000], *kinds])


def heldout_text() -> str:
    """121 kB of handbook English that perplexity is measured on; nothing may be fitted to it."""
    return (files("engine") / "data" / "heldout.txt").read_text(encoding="utf-8")
