"""The drift curve as a figure: KL from the float cache by position in the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.errors import LowbitError
from lowbit.measure.kv.result import CacheCheck
from lowbit.report.plots import draw_verdicts, empty_figure, number_kl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
_MARKS = "osD^vP*"


def draw_drift(check: CacheCheck) -> Figure:
    """One line for each format, with one standard error, behind them what such a KL means. LowbitError without a format that differs."""
    rows = [row for row in check.measured if any(d.kl.value > 0 for d in row.deciles)]
    if not rows:
        raise LowbitError("no format differs from the float cache, so there is nothing to draw")
    figure = empty_figure(8.0, 5.0)
    axes = figure.subplots()
    for i, row in enumerate(rows):
        x = [(d.first + d.last) / 2 for d in row.deciles]
        y = [max(d.kl.value, 1e-12) for d in row.deciles]
        errors = [
            [min(d.kl.stderr or 0.0, 0.9 * v) for d, v in zip(row.deciles, y)],
            [d.kl.stderr or 0.0 for d in row.deciles],
        ]
        name = f"{row.name}, {row.bits:.2f} bits"
        axes.errorbar(
            x, y, yerr=errors, label=name, color=_COLOURS[i % 7], marker=_MARKS[i % 7], markersize=4, linewidth=1.2, capsize=2
        )  # fmt: skip
    axes.set_yscale("log")
    lows, highs = zip(*((min(d.kl.value for d in row.deciles), max(d.kl.value for d in row.deciles)) for row in rows))
    axes.set_ylim(max(1e-9, min(lows) / 3), max(highs) * 3)
    axes.set_xlim(0, check.text.length)
    number_kl(axes)
    draw_verdicts(axes)
    axes.set_xlabel("position in the context, tokens", fontsize=10)
    axes.set_ylabel("KL from the float cache, nats per token; lower is better", fontsize=10)
    axes.set_title(check.model, loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    return figure
