"""Artefact files in, figure files out: which figure a kind has, PNG and SVG written alike.

The same artefact gives the same file, byte for byte.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from engine.artifacts import Artifact, Evaluation, Profile, read_raw
from engine.errors import InputError
from engine.judgement import Judgement
from engine.pruning.budget import Budget
from engine.report import figures
from engine.report.drawing import style
from engine.scratch import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 300
KINDS = {kind.kind: kind for kind in (Profile, Evaluation, Judgement, Budget)}
FIGURES = {  # the first one of a kind of artefact is drawn where none is asked for
    "heatmap": Profile,
    "curves": Profile,
    "quality": Evaluation,
    "budget": Budget,
}


def read(path: Path) -> Profile | Evaluation | Judgement | Budget:
    """The artefact in a file, by its "kind"; InputError when neither figure nor page shows it."""
    raw = read_raw(path)
    kind = raw.get("kind") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{path}: expected one of {', '.join(KINDS)}, found {kind!r}")
    return KINDS[kind].from_json(raw, str(path))


def draw(artefacts: Sequence[Artifact], kind: str | None = None) -> "Figure":
    """The figure `kind`, one of FIGURES, of artefacts of the one kind that it shows."""
    found = {type(artefact) for artefact in artefacts}
    if len(found) != 1:
        names = ", ".join(sorted(each.kind for each in found)) or "none"
        raise InputError(f"a figure shows artefacts of one kind, found {names}")
    (given,) = found
    fitting = [name for name, shown in FIGURES.items() if shown is given]
    if not fitting:
        raise InputError(f"a {given.kind} has no figure; a page, which ends in .html, shows it")
    kind = fitting[0] if kind is None else kind
    if kind not in fitting:
        raise InputError(
            f"kind: expected {' or '.join(fitting)} for a file of kind {given.kind}, found {kind!r}"
        )
    if kind == "quality":
        return figures.quality([each for each in artefacts if isinstance(each, Evaluation)])
    if len(artefacts) > 1:
        raise InputError(f"{kind}: expected one {given.kind}, found {len(artefacts)}")
    draw_one: dict[str, Callable[[Any], Figure]] = {
        "heatmap": figures.heat_map, "curves": figures.curves, "budget": figures.bars
    }  # fmt: skip
    return draw_one[kind](artefacts[0])


def save(figure: "Figure", path: Path) -> None:
    """SVG where the name ends so, else PNG; written beside and renamed."""
    if path.suffix.lower() == ".svg":
        content = svg(figure).encode()
    else:
        content = _rendered(figure, "png", Software=None)
    with replacing(path) as beside:
        beside.write_bytes(content)


def svg(figure: "Figure") -> str:
    """A whole SVG document, without a date or a version of anything."""
    return _rendered(figure, "svg", Creator=None, Date=None, Format=None, Type=None).decode()


def inline_svg(figure: "Figure", name: str, label: str) -> str:
    """The <svg> element for an HTML page: ids begin with `name`, readers hear `label`."""
    element = svg(figure)
    element = element[element.index("<svg") :]
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'(href="|url\()#', rf"\1#{name}-", element)
    return element.replace("<svg", f'<svg role="img" aria-label={quoteattr(label)}', 1)


@style()
def _rendered(figure: "Figure", form: str, **metadata: None) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=form, dpi=DPI, metadata=metadata)
    return content.getvalue()
