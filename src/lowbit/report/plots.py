"""Two figures: what quantizing does to the weights, and what quality costs in size.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart, and nothing is
said by colour alone. matplotlib is optional and drawn without a display or any global state.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError, OutputError
from lowbit.interchange.files.atomic import replace_file
from lowbit.measure.compare import CompareRow
from lowbit.measure.verdict import THRESHOLDS
from lowbit.report.labels import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
_BANDS = ("#E3F1E6", "#F1F6E1", "#FCF1DA", "#F9E3E0")  # behind the verdicts, from the best to the worst
_BINS = 161
_WIDTH = 8.0  # inches of every figure: letters stay readable where it is shown 800 pixels wide
_COLUMNS = 3  # panels beside each other
_TITLE = 30  # characters above a panel
_WEIGHT_ERROR = (
    "Weight error: ||W - Q|| / ||W||, what rounding changed in this tensor over its weights. "
    "Values: how many different ones remain."
)


@dataclass(frozen=True, eq=False)
class WeightPanel:
    """One layer under one recipe: its weights, and what they became, of the same shape."""

    layer: str
    recipe: str
    original: Tensor
    dequantized: Tensor


@dataclass(frozen=True)
class FrontierPoint:
    """A recipe: its size (bits per weight or MiB) and its mean KL, with its standard error."""

    label: str
    size: float
    kl: float
    stderr: float | None = None


def draw_weights(panels: Sequence[WeightPanel], *, note: str = "") -> Figure:
    """Histograms of the weights before (filled) and after (line): a strip for each layer, in which each recipe has a panel.

    The share of weights in a bin is on a log scale, so that outliers show. Each panel states the
    relative error of the weights, ||W - Q|| / ||W||, and how many values remain. `note`: which layers these are, and why.
    """
    if not panels:
        raise LowbitError("there are no weights to draw: name at least one layer and one recipe")
    layers = list(dict.fromkeys(panel.layer for panel in panels))
    recipes = list(dict.fromkeys(panel.recipe for panel in panels))
    columns = min(_COLUMNS, len(recipes))
    rows = -(-len(recipes) // columns)
    figure = empty_figure(_WIDTH, len(layers) * (1.75 * rows + 0.35) + 1.1)
    strips = figure.subfigures(len(layers), 1, squeeze=False)[:, 0]
    for layer, strip in zip(layers, strips, strict=True):
        strip.suptitle(layer.removesuffix(".weight"), x=0.01, ha="left", fontsize=10, fontweight="bold")
        axes = list(strip.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
        for place, each in enumerate(axes):
            each.set_visible(False)
            each.tick_params(labelbottom=place + columns >= len(recipes), labelleft=place % columns == 0)
        for panel in panels:
            if panel.layer == layer:
                place = recipes.index(panel.recipe)
                _draw_panel(axes[place], panel)
                axes[place].set_title(_wrapped(panel.recipe), fontsize=9)
        strip.supylabel("share of weights (log)", fontsize=9)
    handles, names = next(each for each in figure.axes if each.get_visible()).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False, fontsize=10)
    figure.supxlabel(
        "\n".join(textwrap.wrap(f"Across: the value of a weight. {_WEIGHT_ERROR} {note}".strip(), 120)),
        fontsize=9,
        x=0.01,
        ha="left",
    )
    return figure


def _draw_panel(axes: Axes, panel: WeightPanel) -> None:
    before = panel.original.detach().float().flatten().cpu()
    after = panel.dequantized.detach().float().flatten().cpu()
    reach = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
    edges = torch.linspace(-reach, reach, _BINS + 1)
    shares = [torch.histogram(values, edges).hist / len(values) for values in (before, after)]
    axes.set_visible(True)
    axes.stairs(shares[0].numpy(), edges.numpy(), fill=True, color=_GREY, alpha=0.45, label="float weights")
    axes.stairs(shares[1].numpy(), edges.numpy(), color=_BLUE, linewidth=0.9, label="after quantizing")
    axes.set_yscale("log")
    axes.set_ylim(0.4 / len(before) if len(before) < 1e6 else 4e-7, 20.0)  # with room for the words
    error = float((before.double() - after.double()).norm() / before.double().norm().clamp_min(1e-300))
    values = len(torch.unique(after))
    axes.text(
        0.03, 0.97, f"weight error {100 * error:.2g} %, {values:,} values".replace(",", " ").replace(" %  ", " %, "),
        transform=axes.transAxes, va="top", fontsize=8.5,
    )  # fmt: skip
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)


def _wrapped(recipe: str) -> str:
    """A recipe as a title, a long one in lines that end at its commas."""
    lines = [""]
    for part in recipe.split(","):
        joined = f"{lines[-1]},{part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= _TITLE else [*lines, part]
    return ",\n".join(line for line in lines if line)


def frontier_points(rows: Sequence[CompareRow], size: str = "bits") -> list[FrontierPoint]:
    """The points of a comparison; `size` is "bits" per weight or "mib". The float model has none."""
    if size not in ("bits", "mib"):
        raise LowbitError(f"size {size!r} cannot be drawn: use 'bits' or 'mib'")
    points = []
    for row in rows:
        if row.is_base or row.card is None or row.card.quality is None or row.card.quality.kl_mean is None:
            continue
        parts, kl = row.card.parts, row.card.quality.kl_mean
        nbytes = parts.bytes_after if parts.bytes_after is not None else parts.weight_bytes
        value = parts.bits if size == "bits" else (None if nbytes is None else nbytes / 2**20)
        if value is not None and 0 < kl.value < float("inf"):
            points.append(FrontierPoint(row.recipe, value, kl.value, kl.stderr))
    return points


def pareto(points: Sequence[FrontierPoint]) -> list[FrontierPoint]:
    """The points that no other beats: smaller or as small, with as little KL. In order of size."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.size, p.kl)):
        if not best or point.kl < best[-1].kl:
            best.append(point)
    return best


def draw_frontier(points: Sequence[FrontierPoint], *, size: str = "bits", title: str = "") -> Figure:
    """Mean KL (log scale) against size (from 0), each recipe labelled, the line of those that none beats, and behind them what such a KL means."""
    if not points:
        raise LowbitError("no recipe has both a size and a KL, so there is nothing to draw")
    figure = empty_figure(_WIDTH, 5.6)
    axes = figure.subplots()
    best = pareto(points)
    beaten = [point for point in points if point not in best]
    _draw_points(axes, best, _BLUE, "o", "best for its size")
    _draw_points(axes, beaten, _ORANGE, "s", "another is no larger and loses less")
    corners = _staircase(best)
    axes.plot(*zip(*corners, strict=True), color=_BLUE, linewidth=1.0, alpha=0.45, zorder=1)
    axes.set_yscale("log")
    low, high = min(p.kl for p in points) / 2, max(p.kl for p in points) * 2
    spread = max(1.0, 10 * low / high) ** 0.5  # at least a decade, or the axis has no round numbers
    axes.set_ylim(low / spread, high * spread)
    # From nothing, so that a distance on the page is a share of the size.
    axes.set_xlim(0, 1.12 * max(p.size for p in points))
    number_kl(axes)
    draw_verdicts(axes)
    axes.set_xlabel(
        "bits per weight: the weight files over all parameters" if size == "bits" else "MiB, all files", fontsize=10
    )
    axes.set_ylabel("KL from the float model, nats per token; lower is better", fontsize=10)
    axes.tick_params(labelsize=9)
    axes.set_title(title, loc="left", fontsize=12)
    axes.grid(True, axis="x", which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=10)
    place_labels(figure, axes, [(p.label, p.size, p.kl) for p in points], avoid=corners)
    return figure


def number_kl(axes: Axes) -> None:
    """Plain numbers on the log axis: 0.1, 0.2, 0.5, 1."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=30))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def draw_verdicts(axes: Axes) -> None:
    """Light bands of what a KL means, as `measure.verdict` has it, with their words on the right."""
    low, high = axes.get_ylim()
    places, words, bottom = [], [], 0.0
    for row, colour in zip(THRESHOLDS, _BANDS, strict=True):
        first, last = max(low, bottom), min(high, row.kl)
        if first < last:
            axes.axhspan(first, last, color=colour, zorder=0, linewidth=0)
            if math.log(last / first) > 0.04 * math.log(high / low):  # a thinner band has no room for its word
                places.append((first * last) ** 0.5)
                words.append(row.word)
        bottom = row.kl
    right = axes.secondary_yaxis("right")
    right.set_yticks(places, words, fontsize=9.5)
    right.tick_params(which="both", length=0)
    right.minorticks_off()
    right.spines["right"].set_visible(False)


def _staircase(points: Sequence[FrontierPoint]) -> list[tuple[float, float]]:
    """The corners of the line through the best points: level to the next size, then down."""
    corners = [(points[0].size, points[0].kl)]
    for point in points[1:]:
        corners += [(point.size, corners[-1][1]), (point.size, point.kl)]
    return corners


def _draw_points(axes: Axes, points: list[FrontierPoint], colour: str, marker: str, name: str) -> None:
    if not points:
        return
    sizes, values = [p.size for p in points], [p.kl for p in points]
    # An error bar may not reach zero on a log axis.
    errors = [[min(p.stderr or 0.0, 0.9 * p.kl) for p in points], [p.stderr or 0.0 for p in points]]
    said = "one standard error" if colour == _BLUE and any(errors[1]) else None  # once is enough
    axes.errorbar(sizes, values, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2, label=said)
    axes.scatter(
        sizes, values, s=34, marker=marker, color=colour, edgecolor="white", linewidth=0.6, label=name, zorder=3
    )


def require() -> None:
    """LowbitError when there is no matplotlib."""
    empty_figure(1, 1)


def save_figure(figure: Figure, path: Path | str) -> Path:
    """Write the figure in the format of the suffix (png, svg, pdf). Raises OutputError when it cannot be."""
    path = Path(path)
    path = path if path.suffix else path.with_name(f"{path.name}.png")
    fresh = path.with_name(f".part-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(fresh, dpi=160)
            replace_file(fresh, path)
        finally:
            fresh.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be written: {error}; name a .png, .svg or .pdf file") from None
    return path


def empty_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LowbitError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
