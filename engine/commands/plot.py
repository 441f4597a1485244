"""`engine plot`: the figure of an artefact."""

from pathlib import Path
from typing import Annotated

import typer

from engine.commands import common
from engine.errors import InputError


def plot(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="A profile, a budget, or evaluations."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Output file: .png, .svg or .html.")],
    kind: Annotated[
        str | None,
        typer.Option(
            help="heatmap, curves, quality or budget. Default: the first that suits the file."
        ),
    ] = None,
) -> None:
    """Plot a profile, a budget or evaluations; as .html, all figures and tables."""
    common.check_writable(out, ".png", ".svg", ".html", reads=files)
    if kind is not None and out.suffix.lower() == ".html":
        raise InputError("plot: a page holds every figure; --kind is for .png and .svg")
    from engine.report import page as report
    from engine.report import plot as figure

    artefacts = [figure.read(file) for file in files]
    if out.suffix.lower() == ".html":
        report.save(artefacts, out)
    else:
        figure.save(figure.draw(artefacts, kind), out)
