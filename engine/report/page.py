"""One HTML page of all figures and tables of some artefacts, without a script or a link."""

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engine.artifacts import Evaluation, Profile, replacing
from engine.pruning.budget import Budget
from engine.report import figures
from engine.report.drawing import base_name
from engine.report.plot import inline_svg
from engine.report.tables import BEST_COLUMNS, BUDGET_COLUMNS, best_blocks, budget_rows

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 48rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; break-inside: avoid; }
figure svg { max-width: 100%; height: auto; }
figcaption, caption { color: #444; font-size: .85rem; text-align: left; padding: .3rem 0; }
div { overflow-x: auto; margin: 1.5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .1rem .6rem; text-align: right; white-space: pre; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 1px solid #888; }
tbody + tbody tr:first-child td { border-top: 1px solid #ccc; }
.dense th, .dense td { padding: 0 .2rem; font-size: .65rem; }
"""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; style-src 'unsafe-inline'">
"""


def save(artefacts: Sequence[Profile | Evaluation | Budget], path: Path) -> None:
    """The page, written beside and renamed."""
    content = page(artefacts)
    with replacing(path) as beside:
        beside.write_text(content, encoding="utf-8")


def page(artefacts: Sequence[Profile | Evaluation | Budget]) -> str:
    """Every profile, then the evaluations together, then every budget."""
    models = dict.fromkeys(base_name(artefact.model) for artefact in artefacts)
    title = html.escape("Layers of " + ", ".join(models))
    parts = [_HEAD, f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"]
    parts.append(f"<h1>{title}</h1>\n")
    for index, artefact in enumerate(artefacts):
        if isinstance(artefact, Profile):
            parts += _profile(artefact, f"profile{index}")
    evaluations = [artefact for artefact in artefacts if isinstance(artefact, Evaluation)]
    if evaluations:
        parts += _quality(evaluations)
    for index, artefact in enumerate(artefacts):
        if isinstance(artefact, Budget):
            parts += _budget(artefact, f"budget{index}")
    return "".join([*parts, "</body>\n</html>\n"])


def _profile(profile: Profile, name: str) -> Iterator[str]:
    yield f"<h2>Angular distance: {html.escape(base_name(profile.model))}</h2>\n"
    if len(profile.layers) > 1:
        yield _figure(
            figures.heat_map(profile),
            f"{name}-heatmap",
            "Shifted rescaled angular distance: each row spans 0 to 1, so colours compare within "
            "a row only; a dot marks the best block of each size.",
        )
        yield _figure(
            figures.curves(profile),
            f"{name}-curves",
            "Mean angular distance across the block of n layers from each start layer.",
        )
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
    yield _table((), [facts.items()], "What was measured")
    if len(profile.layers) > 1:
        yield _table(BEST_COLUMNS, [best_blocks(profile)], "The best block of every size")
        rescaled = (
            [str(count), *(f"{100 * value:.0f}" for value in profile.rescaled(count))]
            for count in range(1, len(profile.layers))
        )
        head = ("n", *map(str, profile.layers))
        yield _table(head, [rescaled], "The heat map in percent, by start layer", "dense")
    layers = zip(profile.layers, profile.influence, profile.magnitude, strict=True)
    single = ((str(layer), f"{a:.6f}", f"{b:.6f}") for layer, a, b in layers)
    yield _table(
        ("layer", "influence", "magnitude"),
        [single],
        "Single layers: 1 - mean cosine of output and input, mean of |output - input| / |output|",
    )


def _quality(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "<h2>Quality</h2>\n"
    if any(e.layers_kept < e.layers_total for e in evaluations):
        caption = "Perplexity of the same windows of text with fewer and fewer layers."
        yield _figure(figures.quality(evaluations), "quality", caption)
    ordered = sorted(evaluations, key=lambda e: (e.model, -e.layers_kept, e.rule or ""))
    cells = (
        (
            e.rule or "-",
            f"{e.layers_kept} of {e.layers_total}",
            f"{e.perplexity:,.4f}" if e.perplexity < 1e6 else f"{e.perplexity:.3e}",
            "-" if e.kl is None else f"{e.kl:.5f}",
            f"{e.windows} x {e.window}{' with BOS' if e.bos else ''}",
            e.layers,
            base_name(e.model),
        )
        for e in ordered
    )
    columns = ("rule", "layers", "perplexity", "KL", "tokens", "kept", "model")
    yield _table(columns, [cells], "Evaluations")


def _budget(budget: Budget, name: str) -> Iterator[str]:
    yield f"<h2>Budget: {html.escape(base_name(budget.model))}</h2>\n"
    caption = "Memory by part and work, before (16 bits) and after."
    yield _figure(figures.bars(budget), name, caption)
    yield _table(BUDGET_COLUMNS, budget_rows(budget), "Before and after")


def _figure(figure, name: str, caption: str) -> str:
    drawn = inline_svg(figure, name, caption)
    return f"<figure>\n{drawn}\n<figcaption>{html.escape(caption)}</figcaption>\n</figure>\n"


def _table(
    columns: Sequence[str],
    sections: Iterable[Iterable[Sequence[str]]],
    caption: str,
    kind: str = "",
) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>\n"

    head = f"<thead>{row(columns, 'th')}</thead>\n" if columns else ""
    bodies = "".join(
        f"<tbody>\n{''.join(row(cells, 'td') for cells in section)}</tbody>\n"
        for section in sections
    )
    return (
        f'<div><table class="{kind}"><caption>{html.escape(caption)}</caption>\n'
        f"{head}{bodies}</table></div>\n"
    )
