"""One HTML page of all figures and tables of some artefacts, without a script or a link."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

from engine.artifacts import Evaluation, Profile
from engine.judgement import Comparison, Judgement
from engine.pruning.budget import Budget
from engine.report import figures
from engine.report.drawing import base_name
from engine.report.plot import inline_svg
from engine.report.records import side_by_side
from engine.report.tables import BEST_COLUMNS, BUDGET_COLUMNS, best_blocks, budget_rows
from engine.scratch import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure


Shown = Profile | Evaluation | Judgement | Budget


@dataclass(frozen=True)
class Figure:
    """A drawing, and the line below it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text in sections of their own."""

    columns: Sequence[str]
    bodies: Iterable[Iterable[Sequence[str]]]
    caption: str
    kind: str = ""


@dataclass(frozen=True)
class Section:
    """What the page shows of one artefact, or of all evaluations."""

    heading: str
    figures: Sequence[Figure]
    tables: Sequence[Table]


def save(artefacts: Sequence[Shown], path: Path) -> None:
    """The page, written beside and renamed."""
    write_text(path, page(artefacts))


def page(artefacts: Sequence[Shown]) -> str:
    """Every profile, the evaluations together, so the judgements, then every budget."""
    models = dict.fromkeys(base_name(artefact.model) for artefact in artefacts)
    numbered = list(enumerate(artefacts))
    sections = [_profile(a, f"profile{i}") for i, a in numbered if isinstance(a, Profile)]
    evaluations = [artefact for artefact in artefacts if isinstance(artefact, Evaluation)]
    if evaluations:
        sections.append(_quality(evaluations))
    judgements = [artefact for artefact in artefacts if isinstance(artefact, Judgement)]
    if judgements:
        sections.append(_judged(judgements))
    sections += [_budget(a, f"budget{i}") for i, a in numbered if isinstance(a, Budget)]
    return render("Layers of " + ", ".join(models), sections)


def render(title: str, sections: Sequence[Section]) -> str:
    environment = Environment(
        loader=PackageLoader("engine.report", ""), autoescape=True, trim_blocks=True,
        undefined=StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    template = environment.get_template("page.html.jinja")
    return template.render(title=title, sections=sections)


def _profile(profile: Profile, name: str) -> Section:
    drawn: list[Figure] = []
    tables: list[Table] = []
    if len(profile.layers) > 1:
        drawn = [
            figure_of(
                figures.heat_map(profile),
                f"{name}-heatmap",
                "Shifted rescaled angular distance: each row spans 0 to 1, so colours compare "
                "within a row only; a dot marks the best block of each size.",
            ),
            figure_of(
                figures.curves(profile),
                f"{name}-curves",
                "Mean angular distance across the block of n layers from each start layer.",
            ),
        ]
    facts = {
        "model": profile.model,
        "layers profiled": f"{len(profile.layers)} of {profile.total_layers}",
        "samples": f"{profile.samples:,} of up to {profile.length:,} tokens",
        "averaged over": f"{profile.vectors:,} vectors, {profile.tokens} tokens",
        "BOS": "yes" if profile.bos else "no",
        "tokens run": f"{profile.tokens_used:,}",
        "text (sha256)": profile.text_hash[:16],
        "profile (sha256)": profile.hash[:16],
    }
    tables.append(Table((), [facts.items()], "What was measured"))
    if len(profile.layers) > 1:
        tables.append(Table(BEST_COLUMNS, [best_blocks(profile)], "The best block of every size"))
        rescaled = (
            [str(count), *(f"{100 * value:.0f}" for value in profile.rescaled(count))]
            for count in range(1, len(profile.layers))
        )
        head = ("n", *map(str, profile.layers))
        tables.append(Table(head, [rescaled], "The heat map in percent, by start layer", "dense"))
    layers = zip(profile.layers, profile.influence, profile.magnitude, strict=True)
    single = ((str(layer), f"{a:.6f}", f"{b:.6f}") for layer, a, b in layers)
    tables.append(
        Table(
            ("layer", "influence", "magnitude"),
            [single],
            "Single layers: 1 - mean cosine of output and input, mean of |output - input| / "
            "|output|",
        )
    )
    return Section(f"Angular distance: {base_name(profile.model)}", drawn, tables)


def _quality(evaluations: Sequence[Evaluation]) -> Section:
    drawn = []
    if any(e.layers_kept < e.layers_total for e in evaluations):
        caption = "Perplexity of the same windows of text with fewer and fewer layers."
        drawn.append(figure_of(figures.quality(evaluations), "quality", caption))
    ordered = sorted(evaluations, key=lambda e: (e.model, -e.layers_kept, e.rule or ""))
    cells = (
        (
            e.rule or "-",
            f"{e.layers_kept} of {e.layers_total}",
            f"{e.perplexity:,.4f}" if e.perplexity < 1e6 else f"{e.perplexity:.3e}",
            "-" if e.kl is None else f"{e.kl:.5f}",
            "-" if e.bits_per_byte is None else f"{e.bits_per_byte:.4f}",
            f"{e.windows} x {e.window}{' with BOS' if e.bos else ''}",
            e.layers,
            base_name(e.model),
        )
        for e in ordered
    )
    columns = ("rule", "layers", "perplexity", "KL", "bits a byte", "tokens", "kept", "model")
    return Section("Quality", drawn, [Table(columns, [cells], "Evaluations")])


def _judged(judgements: Sequence[Judgement]) -> Section:
    """Compared with the first."""
    rows = side_by_side(Comparison.of(tuple(judgements)))
    columns = ("", *(base_name(each.model) for each in judgements))
    cells = ((name, *row) for name, row in rows)
    return Section("Judgement", [], [Table(columns, [cells], "Beside the first")])


def _budget(budget: Budget, name: str) -> Section:
    caption = "Memory by part and work, before (16 bits) and after."
    return Section(
        f"Budget: {base_name(budget.model)}",
        [figure_of(figures.bars(budget), name, caption)],
        [Table(BUDGET_COLUMNS, budget_rows(budget), "Before and after")],
    )


def figure_of(figure: "MatplotlibFigure", name: str, caption: str) -> Figure:
    return Figure(inline_svg(figure, name, caption), caption)
