"""What the figures share: one style, colours, axes in inches, ticks on layers."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; yellow is too pale for a line.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, AMBER, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#999999"
LINES = tuple(zip((BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, BLACK), "osD^vPX", strict=True))
DASHES = ("-", "--", "-.", ":")


@contextmanager
def style() -> Iterator[None]:
    """Our settings for the duration, whatever a matplotlibrc says."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "font.size": 9.0,
                "axes.titlesize": 9.0,
                "axes.titlelocation": "left",
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.linewidth": 0.6,
                "grid.color": "#d9d9d9",
                "grid.linewidth": 0.5,
                "axes.axisbelow": True,
                "hatch.linewidth": 0.5,
                "legend.frameon": False,
                "figure.constrained_layout.use": True,
                "svg.hashsalt": "shallow",  # ids that do not change from run to run
                "svg.fonttype": "path",  # the same in every viewer
            }
        )
        yield


def new_figure(height: float, rows: int = 1) -> tuple["Figure", Any]:
    """(figure, its axes: one, or an array of `rows`), as wide as the text of a page, in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height))
    return figure, figure.subplots(rows)


def step(total: int) -> int:
    """From one labelled layer to the next, so that there are at most eight."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, total) if step * 8 >= total)


def named(total: int) -> list[int]:
    """The block sizes that carry a label."""
    return sorted({1, *range(step(total), total, step(total))})


def layer_ticks(axes: "Axes", layers: Sequence[int]) -> None:
    """Positions on the axis are slots of the profiled model, labels the checkpoint's layers."""
    slots = range(0, len(layers), step(len(layers)))
    axes.set_xticks(list(slots), [str(layers[slot]) for slot in slots])


def whole_ticks(axis: "Axis") -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def log_ticks(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis where the values span enough for one; plain numbers up to a thousand."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    span = max(values) / min(values)
    if span > 3:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    if 3 < span < 1000:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def base_name(model: str) -> str:
    """The last part of a path or a hub id."""
    return model.rstrip("/").rpartition("/")[2].removesuffix(".gguf") or model


def short(model: str) -> str:
    """The name of a model for a title or a legend."""
    name = base_name(model)
    return plain(name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}")


def plain(text: str) -> str:
    """Text of the user as it stands: a $ begins no formula, a first _ hides no label."""
    return " ".join(text.split()).replace("$", r"\$").lstrip("_") or "-"
