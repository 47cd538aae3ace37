"""Labels beside points so that none covers another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Directions to try, near ones first: right, left, above, below, then the corners.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1))
_DISTANCES = (8, 14, 22, 32, 44, 58, 74)  # points
_MARKER = 5.0  # half the side of a marker, in pixels at 100 dpi, with its margin


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[tuple[str, float, float]], *, avoid: Sequence[tuple[float, float]] = ()
) -> None:
    """Write each (text, x, y) at the nearest place free of other labels, points and a line.

    `avoid` are the corners of that line, whose pieces run level or upright. Points that touch share
    one label, a line each, the highest first. Greedy, from left to right; a label that went far gets
    a thin line to its point. When no place is free the one with the least overlap is taken. The
    figure's layout is fixed from here on.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the places hold only while the axes stay where they are
    points = [axes.transData.transform((x, y)) for _, x, y in labels]
    taken = [(px - _MARKER, py - _MARKER, px + _MARKER, py + _MARKER) for px, py in points]
    corners = [axes.transData.transform(corner) for corner in avoid]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    frame = tuple(axes.get_window_extent().extents)
    for group in sorted(_touching(points), key=lambda g: min(tuple(points[i]) for i in g)):
        text = "\n".join(labels[i][0] for i in sorted(group, key=lambda i: -points[i][1]))
        middle = sum(points[i] for i in group) / len(group)
        _place_one(figure, axes, text, tuple(axes.transData.inverted().transform(middle)), taken, frame)


def _touching(points: Sequence[Any]) -> list[list[int]]:
    """Indices of the points, in groups where each touches another of its group."""
    groups: list[list[int]] = []
    for index, (x, y) in enumerate(points):
        near = [g for g in groups if any(max(abs(points[i] - (x, y))) < 2 * _MARKER for i in g)]
        groups = [g for g in groups if g not in near] + [[index, *(i for g in near for i in g)]]
    return groups


def _place_one(figure: Figure, axes: Axes, text: str, point: tuple[float, float], taken: list[Any], frame: Any) -> None:
    best: tuple[float, Any, Any] | None = None
    for distance in _DISTANCES:
        for dx, dy in _DIRECTIONS:
            step = distance if 0 in (dx, dy) else 0.75 * distance
            note = axes.annotate(
                text, point, xytext=(dx * step, dy * step), textcoords="offset points", fontsize=8.5,
                ha=("right", "center", "left")[dx + 1], va=("top", "center", "bottom")[dy + 1],
                arrowprops=_leader() if distance >= 14 else None, zorder=4,
                path_effects=_halo(),
            )  # fmt: skip
            box = _text_box(figure, note)
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, frame)
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, note, box)
            else:
                note.remove()
            if best[0] == 0:
                taken.append(best[2])
                return
    if best is not None:
        taken.append(best[2])


def _text_box(figure: Any, note: Any) -> tuple[float, ...]:
    """The extent in pixels of an annotation's text without its leader line."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    note.update_positions(renderer)
    return tuple(Text.get_window_extent(note, renderer).extents)


def _halo() -> list[Any]:
    """A white edge, so that a line that must pass behind a label does not cross its letters."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2.5, foreground="white")]


def _leader() -> dict[str, Any]:
    return {"arrowstyle": "-", "color": "#8C8C8C", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 4}


def _overlap(a: Any, b: Any) -> float:
    """Area that two boxes (left, bottom, right, top) share."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Any, frame: Any) -> float:
    """Area of a box that lies beyond the frame, roughly."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return area - _overlap(box, frame)
