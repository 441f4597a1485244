"""`engine compare`: what several models were judged by, side by side."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.commands import common, output
from engine.errors import InputError

if TYPE_CHECKING:
    from engine.judgement import Comparison, Judgement


def compare(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...", help="Records of `engine eval --json`, the whole model's first."
        ),
    ],
    json_file: common.JsonFile = None,
) -> None:
    """Records of `engine eval` side by side, compared with the first; the last line is JSON."""
    common.check_writable(json_file, reads=files)
    if len(files) < 2:
        raise InputError("compare: expected two records or more, found one")
    from engine.judgement import Comparison

    found = Comparison.of(tuple(read(file) for file in files))
    common.hand_out(found, json_file, partial(show, found, [file.name for file in files]))


def read(path: Path) -> "Judgement":
    """The record in a file; an evaluation of one text as the judgement that it is all of."""
    from engine.artifacts import Evaluation, read_raw
    from engine.judgement import BUILT_IN, Judgement

    raw = read_raw(path)
    if isinstance(raw, dict) and raw.get("kind") == Evaluation.kind:
        text = Evaluation.from_json(raw, str(path))
        return Judgement.of({text.text or BUILT_IN: text})
    return Judgement.from_json(raw, str(path))


def show(found: "Comparison", names: list[str]) -> None:
    from rich.table import Table

    from engine.report.records import side_by_side

    table = Table("", *names, pad_edge=False)
    for name, cells in side_by_side(found):
        table.add_row(name, *cells)
    output.show(table)
