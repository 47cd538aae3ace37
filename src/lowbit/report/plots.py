"""Two figures: what quantizing does to the weights, and what quality costs in size.

Colours are from Okabe and Ito's palette, which colour-blind readers can tell apart, and nothing is
said by colour alone. matplotlib is optional and drawn without a display or any global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError, OutputError
from lowbit.interchange.files.atomic import replace_file
from lowbit.measure.compare import CompareRow
from lowbit.report.labels import place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8C8C8C"
_BINS = 161


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


def draw_weights(panels: Sequence[WeightPanel]) -> Figure:
    """Histograms before (filled) and after (line): a row for each layer, a column for each recipe.

    The share of weights in a bin is on a log scale, so that outliers show. Each panel states the
    relative error ||W - Q|| / ||W|| and how many values remain.
    """
    if not panels:
        raise LowbitError("there are no weights to draw: name at least one layer and one recipe")
    layers = list(dict.fromkeys(panel.layer for panel in panels))
    recipes = list(dict.fromkeys(panel.recipe for panel in panels))
    figure = _figure(2.6 * len(recipes) + 0.9, 2.0 * len(layers) + 0.9)
    axes = figure.subplots(len(layers), len(recipes), sharex="row", sharey=True, squeeze=False)
    for row in axes:
        for each in row:
            each.set_visible(False)
    for panel in panels:
        row, column = layers.index(panel.layer), recipes.index(panel.recipe)
        _draw_panel(axes[row][column], panel)
        if row == 0:
            axes[row][column].set_title(panel.recipe, fontsize=10, fontweight="bold")
        if column == 0:
            axes[row][column].set_ylabel(f"{_short(panel.layer)}\nshare of weights", fontsize=8)
        if row == len(layers) - 1:
            axes[row][column].set_xlabel("weight", fontsize=8)
    handles, names = next(each for each in axes.flat if each.get_visible()).get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def _draw_panel(axes: Axes, panel: WeightPanel) -> None:
    before = panel.original.detach().float().flatten().cpu()
    after = panel.dequantized.detach().float().flatten().cpu()
    reach = max(float(before.abs().max()), float(after.abs().max()), 1e-12)
    edges = torch.linspace(-reach, reach, _BINS + 1)
    shares = [torch.histogram(values, edges).hist / len(values) for values in (before, after)]
    axes.set_visible(True)
    axes.stairs(shares[0].numpy(), edges.numpy(), fill=True, color=_GREY, alpha=0.45, label="before")
    axes.stairs(shares[1].numpy(), edges.numpy(), color=_BLUE, linewidth=0.9, label="after")
    axes.set_yscale("log")
    axes.set_ylim(0.4 / len(before) if len(before) < 1e6 else 4e-7, 3.0)
    error = float((before.double() - after.double()).norm() / before.double().norm().clamp_min(1e-300))
    values = len(torch.unique(after))
    axes.text(
        0.03,
        0.96,
        f"error {100 * error:.2g} %\n{values:,} values".replace(",", " "),
        transform=axes.transAxes,
        va="top",
        fontsize=7.5,
    )
    axes.tick_params(labelsize=7)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right"]].set_visible(False)


def _short(name: str) -> str:
    """The last parts of a parameter's name, short enough for an axis."""
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-3:]) if len(parts) > 3 else ".".join(parts)


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
    """Mean KL (log scale) against size, each recipe labelled, and the line of those that none beats."""
    if not points:
        raise LowbitError("no recipe has both a size and a KL, so there is nothing to draw")
    figure = _figure(8.0, 5.2)
    axes = figure.subplots()
    best = pareto(points)
    beaten = [point for point in points if point not in best]
    _draw_points(axes, best, _BLUE, "o", "no other is both smaller and closer")
    _draw_points(axes, beaten, _ORANGE, "s", "another is smaller and closer")
    corners = _staircase(best)
    axes.plot(*zip(*corners, strict=True), color=_BLUE, linewidth=1.0, alpha=0.45, zorder=1)
    axes.set_yscale("log")
    axes.margins(x=0.1)
    low, high = min(p.kl for p in points) / 2, max(p.kl for p in points) * 2
    spread = max(1.0, 10 * low / high) ** 0.5  # at least a decade, or the axis has no round numbers
    axes.set_ylim(low / spread, high * spread)
    axes.set_xlabel("bits per weight, all files" if size == "bits" else "MiB, all files")
    axes.set_ylabel("KL from the float model, nats per token")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(True, which="major", color="#DDDDDD", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    place_labels(figure, axes, [(p.label, p.size, p.kl) for p in points], avoid=corners)
    return figure


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
    axes.errorbar(sizes, values, yerr=errors, fmt="none", ecolor=colour, elinewidth=1, capsize=2, zorder=2)
    axes.scatter(
        sizes, values, s=34, marker=marker, color=colour, edgecolor="white", linewidth=0.6, label=name, zorder=3
    )


def require() -> None:
    """LowbitError when there is no matplotlib."""
    _figure(1, 1)


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


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise LowbitError("figures need matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
