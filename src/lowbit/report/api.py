"""compare, with its figures."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import OutputError
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.measure import api
from lowbit.measure.compare import CompareRow
from lowbit.nn.swap import packed_weights
from lowbit.pipeline.api import Quantized
from lowbit.report import plots as figures


def compare(
    model: str | Path | nn.Module, recipes: list[str] | None = None, *, plots: str | Path | None = None, **options: Any
) -> list[CompareRow]:
    """Many recipes on one model, measured in one go; every data-free preset when `recipes` is None.

    `plots`: a folder for two figures, weights before and after and quality against size (needs matplotlib). Other
    options are those of `lowbit.measure.api.compare`: calibration, samples, text, windows, length, speed, tokenizer, progress, on_row.
    """
    if plots is None:
        return api.compare(model, recipes, **options)
    drawing = Drawing(open_source(model), Path(plots))
    try:
        rows = api.compare(model, recipes, on_made=drawing.add, **options)
        drawing.save(rows)
    except BaseException:
        drawing.leave_nothing()
        raise
    return rows


class Drawing:
    """Collects what the figures show while recipes are compared: samples of a few layers before and after."""

    LAYERS = 3
    SAMPLE = 1 << 16

    def __init__(self, source: Source, folder: Path) -> None:
        """LowbitError without matplotlib, OutputError when `folder` cannot be made: both before any work."""
        figures.require()
        self.made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot draw into {folder}: {error.strerror or error}") from error
        self.source, self.folder = source, folder
        linear = [n for n, p in source.inventory.params.items() if p.kind in ("linear", "conv1d") and p.keep is None]
        # Spread over the depth, and shifted a little so that not every one is the same projection.
        places = (len(linear) * (2 * i + 1) // (2 * self.LAYERS) + 2 * i for i in range(self.LAYERS))
        self.layers = list(dict.fromkeys(linear[min(place, len(linear) - 1)] for place in places)) if linear else []
        self.panels: list[figures.WeightPanel] = []

    def add(self, recipe: str, made: Quantized) -> None:
        """Sample the chosen layers of one result."""
        packed = dict(packed_weights(made.model))
        for layer in self.layers:
            before = self.source.read(layer).float().reshape(-1)
            after = packed[layer].dequantize().float().reshape(-1) if layer in packed else before
            stride = max(1, len(before) // self.SAMPLE)
            self.panels.append(figures.WeightPanel(layer, recipe, before[::stride].clone(), after[::stride].clone()))

    def leave_nothing(self) -> None:
        """Remove the folder where it was made for the figures and none is in it."""
        if self.made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def save(self, rows: list[CompareRow]) -> None:
        """Draw weights.png and frontier.png."""
        try:
            figures.save_figure(figures.draw_weights(self.panels), self.folder / "weights.png")
            points = figures.frontier_points(rows, "bits")
            figures.save_figure(figures.draw_frontier(points, title=self.source.label), self.folder / "frontier.png")
        except OSError as error:
            raise OutputError(f"cannot draw into {self.folder}: {error.strerror or error}") from error
