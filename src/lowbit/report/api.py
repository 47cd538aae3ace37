"""compare, with its figures."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.calibration.data import SAMPLES
from lowbit.errors import OutputError
from lowbit.interchange.opening import open_source
from lowbit.interchange.progress import OnStep
from lowbit.interchange.source import Source
from lowbit.measure import api
from lowbit.measure.compare import CompareRow
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.quality import Progress
from lowbit.measure.row_file import RowFile
from lowbit.nn.swap import packed_weights
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.effort import AUTO
from lowbit.report import plots as figures
from lowbit.report.comparison import Comparison

_log = logging.getLogger("lowbit")


def compare(
    model: str | Path | nn.Module,
    recipes: Sequence[str] | None = None,
    *,
    calibration: Any = None,
    samples: int = SAMPLES,
    effort: str = AUTO,
    text: str | Path | Sequence[str] | None = None,
    windows: int | None = None,
    length: int = 1024,
    speed: bool | SpeedSettings = False,
    plots: str | Path | None = None,
    keep: str | Path | None = None,
    keep_after: bool = True,
    tokenizer: Any = None,
    progress: Progress | bool | None = None,
    on_step: OnStep | None = None,
    on_row: Callable[[CompareRow], None] | None = None,
) -> Comparison:
    """Many recipes on one model, measured in one go; every data-free preset when `recipes` is None.

    Each recipe is quantized, written, read back by `from_pretrained` and measured on `windows` windows (all when None) of `length` tokens of
    `text`: a file, strings or a dataset id, Python's own manual when None. `calibration`: text (as in `quantize`), `samples` windows of it, for
    every recipe that looks at data; where none is given, `effort` says of names such as "w4" what it says in `quantize`. `speed`: also tokens per second. `plots`: a folder for two figures, weights before
    and after and quality against size (needs matplotlib).

    `keep`: a file in which rows are kept as they are finished; the same call goes on from them when it was interrupted, and `keep_after=False`
    takes them away when all is done. `on_row` sees each row, `on_step` what is at work and the time left, and `progress(windows done, windows
    in all)` counts those of the float model and of every recipe.

    The rows are a list, the float model's first, and print as one table. A recipe that ends in a LowbitError is a row with its text.
    TextError for a text that is shorter than a window, OutputError for a folder that cannot be drawn into.

    >>> rows = lowbit.compare(model, ["w8", "w4"], text=text, windows=1, length=64)
    >>> [row.recipe for row in rows]
    ['float32', 'w8', 'w4']
    """
    file = None if keep is None else RowFile(keep)
    drawing = None if plots is None else Drawing(open_source(model), Path(plots))
    try:
        rows = api.compare(
            model, recipes, calibration=calibration, samples=samples, effort=effort, text=text, windows=windows, length=length, speed=speed,
            tokenizer=tokenizer, progress=progress, on_step=on_step, on_row=on_row,
            on_made=None if drawing is None else drawing.add, keep=file,
        )  # fmt: skip
        if drawing is not None:
            drawing.save(rows)
    except BaseException:
        if drawing is not None:
            drawing.leave_nothing()
        raise
    if file is not None and not keep_after:
        file.forget()
    return Comparison(rows)


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
        self.note = (
            f"Shown are {len(self.layers)} of the {len(linear)} linear layers, from the beginning, the middle and the end of the "
            f"model, by at most {self.SAMPLE} of the weights of each."
        )
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
        """Draw weights.png and frontier.png, as far as there is something to draw: what was measured is worth more than a figure."""
        points = figures.frontier_points(rows, "bits")
        if not self.panels or not points:
            _log.warning("no recipe was quantized with a loss that can be drawn, so figures are left out")
            return
        try:
            figures.save_figure(figures.draw_weights(self.panels, note=self.note), self.folder / "weights.png")
            figures.save_figure(
                figures.draw_frontier(points, title=f"{self.source.label}: what each recipe costs"),
                self.folder / "frontier.png",
            )
        except OSError as error:
            raise OutputError(f"cannot draw into {self.folder}: {error.strerror or error}") from error
