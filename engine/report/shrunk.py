"""The page of a shrunken model: what it was and is, how well it speaks, how fast it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.architecture.layers import format_layers
from engine.artifacts import HealRecord, Plan, Profile
from engine.judgement import Comparison, Judgement
from engine.pruning.budget import Budget
from engine.report import figures
from engine.report.drawing import base_name
from engine.report.page import Figure, Section, Table, figure_of, render
from engine.report.records import side_by_side
from engine.report.tables import BUDGET_COLUMNS, budget_rows
from engine.scratch import write_text

BESIDE = ("", "it was", "it is")


@dataclass(frozen=True)
class Shrunk:
    """All that is known of a model before and after; `sizes` and `speeds` are rows of BESIDE."""

    model: str
    profile: Profile
    plan: Plan
    healing: HealRecord
    budget: Budget
    before: Judgement
    after: Judgement
    sizes: Sequence[tuple[str, str, str]]
    speeds: Sequence[tuple[str, str, str]]
    conditions: str  # of the speeds


def save(shrunk: Shrunk, path: Path) -> None:
    """The page, written beside and renamed."""
    title = f"{base_name(shrunk.model)}, shrunk"
    sections = [_is(shrunk), _speaks(shrunk), _runs(shrunk), _layers(shrunk), _healed(shrunk)]
    write_text(path, render(title, sections))


def quality_rows(shrunk: Shrunk) -> list[tuple[str, str, str]]:
    """Rows of BESIDE: what both were judged by."""
    found = side_by_side(Comparison.of((shrunk.before, shrunk.after)))
    return [(name, was, now) for name, (was, now) in found]


def _is(shrunk: Shrunk) -> Section:
    caption = "Memory by part and work, before (16 bits) and after."
    return Section(
        "What it was, what it is",
        [figure_of(figures.bars(shrunk.budget), "budget", caption)],
        [
            Table(BESIDE, [shrunk.sizes], "Before and after"),
            Table(BUDGET_COLUMNS, budget_rows(shrunk.budget), "By part"),
        ],
    )


def _speaks(shrunk: Shrunk) -> Section:
    caption = "The same texts, questions and prompts; perplexities are multiples of the first."
    return Section("How well it speaks", [], [Table(BESIDE, [quality_rows(shrunk)], caption)])


def _runs(shrunk: Shrunk) -> Section:
    return Section("How fast it runs", [], [Table(BESIDE, [shrunk.speeds], shrunk.conditions)])


def _layers(shrunk: Shrunk) -> Section:
    profile, plan = shrunk.profile, shrunk.plan
    facts = {
        "dropped": format_layers(plan.drop),
        "by": f"{plan.rule}{f' ({plan.note})' if plan.note else ''}",
        "score": "-" if plan.score is None else f"{plan.score:.6f}",
        "protected": format_layers(plan.protect) or "none",
    }
    drawn: list[Figure] = []
    if len(profile.layers) > 1:
        caption = "Shifted rescaled angular distance: each row spans 0 to 1."
        drawn.append(figure_of(figures.heat_map(profile), "heatmap", caption))
    return Section("Which layers went", drawn, [Table((), [facts.items()], "The plan")])


def _healed(shrunk: Shrunk) -> Section:
    record = shrunk.healing
    facts = {
        "methods": ", ".join(record.methods),
        "steps": f"{record.steps:,}; the weights are those of step {record.best_step:,}",
        "minutes": f"{record.minutes:.1f}",
        "ended": record.stopped or "-",
        "held-out perplexity": f"{record.perplexity_before:,.4f} before, "
        f"{record.perplexity_after:,.4f} after",
        "text (sha256)": record.text_hash[:16],
    }
    drawn = []
    if record.losses:
        caption = "Divergence from the whole model by step, and perplexity on text held out."
        drawn.append(figure_of(figures.healing(record), "healing", caption))
    return Section("How it healed", drawn, [Table((), [facts.items()], "The healing")])
