"""Figures of artefacts, sized for a page, readable in print and by the colour-blind.

matplotlib is used through its objects alone: no window, no global figure, no setting left behind.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.artifacts import Evaluation, HealRecord, Profile
from engine.errors import InputError
from engine.pruning.budget import Budget
from engine.report.drawing import (
    AMBER,
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    SKY,
    layer_ticks,
    log_ticks,
    named,
    new_figure,
    plain,
    short,
    style,
    whole_ticks,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LARGEST = 1e100  # perplexity; an axis needs room beyond it
MANUAL = "by hand"  # for layers that no plan chose: points, not a curve
PARTS = {  # of a bar: label, colour and hatch
    "embedding": ("embedding", BLUE, ""),
    "attention": ("attention", ORANGE, "///"),
    "mlp": ("MLP", GREEN, ""),
    "norms": ("norms", PURPLE, "..."),
    "head": ("head", SKY, "\\\\\\"),
    "scales": ("scales", AMBER, "xxx"),
    "cache": ("KV cache", BLACK, ""),
    "weights": ("products with weights", GREY, ""),
    "over": ("attention over the cache", BLACK, ""),
}


@style()
def heat_map(profile: Profile) -> "Figure":
    """The shifted rescaled angular distance: x the first layer of a block, y its size n.

    Every row is scaled to 0..1 by itself, so colours compare within a row alone; a dot marks the
    best block of each. n runs from 1 to L - 1.
    """
    import numpy as np

    total = _blocks(profile)
    grid = np.ma.array(np.zeros((total - 1, total)), mask=True)
    for count in range(1, total):
        grid[count - 1, : total - count + 1] = profile.rescaled(count)
    figure, axes = new_figure(4.9)
    mesh = axes.pcolormesh(
        np.arange(total + 1) - 0.5, np.arange(total) + 0.5, grid,
        cmap="viridis", vmin=0, vmax=1, edgecolors="face", linewidth=0.1,
    )  # fmt: skip
    sizes = range(1, total)
    best = [profile.best(count) for count in sizes]
    axes.plot(
        best, sizes, "o", color="white", markeredgecolor="black", markeredgewidth=0.5,
        markersize=min(4.5, 120 / total), label="best block of its size",
    )  # fmt: skip
    axes.set(aspect="equal", xlabel="start layer", ylabel="block size $n$")
    axes.set_yticks(named(total))
    layer_ticks(axes, profile.layers)
    axes.legend(loc="upper right", handletextpad=0.2, borderaxespad=0)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.8, aspect=28, pad=0.02)
    bar.set_label("shifted rescaled angular distance")
    bar.outline.set_linewidth(0.6)
    assert bar.solids is not None  # the bar of a mesh has them
    bar.solids.set_rasterized(False)
    axes.set_title(_conditions(profile))
    return figure


@style()
def curves(profile: Profile) -> "Figure":
    """The angular distance by start layer, one curve for every block size n from 1 to L - 1.

    Some sizes are named; around these lies a band of one standard error to either side, and a
    dot marks the best block.
    """
    import matplotlib
    import numpy as np

    total = _blocks(profile)
    labelled = named(total)
    figure, axes = new_figure(3.8)
    for count in range(1, total):
        row = np.array(profile.distances[count - 1])
        starts, colour = np.arange(len(row)), matplotlib.colormaps["viridis"](0.8 * count / total)
        if count not in labelled:
            axes.plot(starts, row, color=colour, linewidth=0.5, alpha=0.6, label=str(count))
            continue
        axes.plot(starts, row, color=colour, linewidth=1.5, zorder=3, label=str(count))
        error = np.array(profile.standard_errors[count - 1])
        axes.fill_between(starts, row - error, row + error, color=colour, alpha=0.25, linewidth=0)
        best = profile.best(count)
        axes.plot(best, row[best], "o", color=colour, markeredgecolor="white", zorder=4)
        axes.annotate(
            f"$n = {count}$" if count == 1 else f"${count}$", (starts[-1], row[-1]),
            xytext=(3, 0), textcoords="offset points", va="center", color=colour,
        )  # fmt: skip
    axes.set(xlabel="start layer", ylabel="angular distance", xlim=(-0.5, total + 1.5))
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")
    layer_ticks(axes, profile.layers)
    best = axes.plot([], [], "o", color="0.3", label="best block of its size")
    band = axes.fill_between([], [], color="0.7", linewidth=0, label="± 1 standard error")
    axes.legend(handles=[*best, band], loc="lower right", ncols=2)
    axes.set_title(_conditions(profile))
    return figure


@style()
def quality(evaluations: Sequence[Evaluation]) -> "Figure":
    """Perplexity against the number of layers dropped, one line for each rule of each model.

    Records without a dropped layer are where the lines of their model begin.
    """
    _comparable(evaluations)
    figure, axes = new_figure(3.8)
    whole = {e.model: e.perplexity for e in evaluations if e.layers_kept == e.layers_total}
    several = len({e.model for e in evaluations}) > 1
    for index, model in enumerate(sorted(whole)):
        axes.axhline(
            whole[model], color="0.4", linewidth=0.8, linestyle=DASHES[1 + index % 3],
            label=f"{short(model)}, all layers" if several else "all layers",
        )  # fmt: skip
    for index, ((model, rule), points) in enumerate(sorted(_series(evaluations).items())):
        start = [(0, whole[model])] if model in whole else []
        dropped, perplexity = zip(*start + points, strict=True)
        colour, marker = LINES[index % len(LINES)]
        axes.plot(
            dropped, perplexity, color=colour, marker=marker, markeredgecolor="white",
            markersize=max(4.0, 8.0 - index), linestyle="" if rule == MANUAL else DASHES[index % 4],
            label=f"{short(model)}, {plain(rule)}" if several else plain(rule),
        )  # fmt: skip
    log_ticks(axes, [e.perplexity for e in evaluations])
    axes.set(xlabel="layers dropped", ylabel="perplexity")
    axes.set_xlim(left=-0.3)
    whole_ticks(axes.xaxis)
    axes.grid(axis="y")
    axes.legend(loc="upper left")
    first = evaluations[0]
    axes.set_title(
        ("" if several else f"{short(first.model)}, {first.layers_total} layers\n")
        + f"{first.windows} windows of {first.window} tokens, "
        + ("with BOS" if first.bos else "no BOS")
    )
    return figure


@style()
def bars(budget: Budget) -> "Figure":
    """Bytes by part, with the KV cache at the context, and FLOPs a token: before and after."""
    sides = budget.before, budget.after
    if not all(side["total_weight_bytes"] and side["flops_per_token"] for side in sides):
        raise InputError(f"the budget of {budget.model} has no weights: there is nothing to draw")
    held = [side["weight_bytes"] | {"cache": side["kv_bytes"]} for side in sides]
    flops = [(side["flops_per_token"], side["attention_flops_per_token"]) for side in sides]
    done = [{"weights": total - over, "over": over} for total, over in flops]
    figure, (memory, work) = new_figure(4.2, rows=2)
    _stack(memory, "B", *held)
    memory.set_title(f"{short(budget.model)}\nmemory with a cache of {budget.context:,} tokens")
    _stack(work, "FLOP", *done)
    work.set_title("work of a token", pad=10)
    names = [f"{sides[0]['layers']} layers\n16 bits"]
    names.append(f"{sides[1]['layers']} layers\n{budget.storage['bits']} bits")
    for axes in (memory, work):
        axes.set_yticks([0, 1], names)
    return figure


@style()
def healing(record: HealRecord) -> "Figure":
    """The loss by step, and below it the held-out perplexity of every check."""
    if not record.losses:
        raise InputError(f"{record.model}: no step was trained; there is nothing to draw")
    figure, (loss, checks) = new_figure(4.2, rows=2)
    steps = range(1, len(record.losses) + 1)
    loss.plot(steps, record.losses, color=BLUE, linewidth=0.8)
    loss.set(ylabel="divergence, nats")
    every = record.settings.get("check_every") or 1
    regular = [min(number * every, record.steps) for number in range(len(record.checks))]
    at = record.check_steps if len(record.check_steps) == len(record.checks) else regular
    checks.plot(at, record.checks, color=ORANGE, marker="o", markeredgecolor="white")
    checks.set(xlabel="step", ylabel="held-out perplexity")
    for axes in (loss, checks):
        axes.set_xlim(left=0)
        axes.grid(axis="y")
    loss.set_title(f"{short(record.model)}, {record.minutes:.1f} minutes")
    return figure


def _stack(axes: "Axes", unit: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Two stacked bars with their totals; a part that is nowhere is left out."""
    scale, prefix = (1e9, "G") if sum(before.values()) >= 1e9 else (1e6, "M")
    left = [0.0, 0.0]
    for part, (label, colour, hatch) in PARTS.items():
        widths = [side.get(part, 0) / scale for side in (before, after)]
        if any(widths):
            axes.barh(
                [0, 1], widths, 0.6, left, label=label, color=colour, hatch=hatch,
                edgecolor="white", linewidth=0.5,
            )  # fmt: skip
            left = [start + width for start, width in zip(left, widths, strict=True)]
    for y, width in enumerate(left):
        share = f" ({width / left[0]:.0%})" if y else ""
        axes.annotate(
            f"{width:,.3g}{share}", (width, y), xytext=(4, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel=f"{prefix}{unit}", xlim=(0, 1.12 * max(left)))
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.32),
        ncols=4,
        columnspacing=1.2,
        handlelength=1.5,
    )


def _comparable(evaluations: Sequence[Evaluation]) -> None:
    """InputError unless all predicted the same windows, and some with a layer dropped."""
    if len({e.text_hash for e in evaluations}) > 1:
        raise InputError("the evaluations predict different windows of text; they do not compare")
    if not any(e.layers_kept < e.layers_total for e in evaluations):
        raise InputError("no evaluation drops a layer: there is nothing to draw")
    for e in evaluations:
        if e.perplexity > LARGEST:
            raise InputError(f"{e.model}: a perplexity of {e.perplexity} is too large to draw")


def _series(evaluations: Sequence[Evaluation]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(model, rule) -> (layers dropped, perplexity), ascending."""
    series: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for e in evaluations:
        if e.layers_kept < e.layers_total:
            rule = MANUAL if e.rule in (None, "", "manual") else e.rule
            point = (e.layers_total - e.layers_kept, e.perplexity)
            series.setdefault((e.model, rule), []).append(point)
    return {key: sorted(points) for key, points in series.items()}


def _blocks(profile: Profile) -> int:
    """L, where there is a block that may be dropped."""
    total = len(profile.layers)
    if total < 2:
        raise InputError(f"the profile of {profile.model} has one layer: there is nothing to draw")
    return total


def _conditions(profile: Profile) -> str:
    """What the figure depends on: the winner changes with the samples, their length and BOS."""
    shorter = profile.tokens_used < profile.samples * profile.length  # some, of rows
    return (
        f"{short(profile.model)}\n{profile.samples} samples of "
        f"{'up to ' if shorter else ''}{profile.length} tokens, "
        f"{'all tokens' if profile.tokens == 'all' else 'last token'}, "
        f"{'with BOS' if profile.bos else 'no BOS'}"
    )
