"""The directory of a study that goes on where it was: of one model and one set of options alone."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engine.checkpoint.adapter import stamps
from engine.checkpoint.locate import locate
from engine.errors import InputError
from engine.scratch import write_text

NOTE = "study.json"


def begin(work: Path, model: str, asked: Mapping[str, Any]) -> None:
    """Makes `work`, or finds what the same study has left there; InputError where another did."""
    said = {"model": stamps(locate(model)), **asked}
    text = json.dumps(said, indent=1, sort_keys=True, default=str)
    work.mkdir(parents=True, exist_ok=True)
    note = work / NOTE
    if note.is_file():
        if note.read_text() != text:
            raise InputError(f"{work}: holds a study of another model or with other options")
    elif any(work.iterdir()):
        raise InputError(f"{work}: expected an empty directory or one of a study, found neither")
    else:
        write_text(note, text)
