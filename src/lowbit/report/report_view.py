"""What quantizing did, drawn for people: the layers with their errors, those with the largest, and the totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lowbit.pipeline.api import Quantized
from lowbit.pipeline.report import LayerReport, Report
from lowbit.report.layout import headline, named_lines, table_or_list
from lowbit.report.wording import bytes_text, grouped, pattern_of, span_text
from lowbit.report.wording import number_text as num

if TYPE_CHECKING:
    from rich.console import RenderableType

_WORST = 5  # layers that are named with the largest errors
_WARNED = 5  # warnings that are given word by word
_NONE = "-"


def render_quantized(made: Quantized, *, width: int = 1000) -> RenderableType:
    """The model and what it became, then its report."""
    from rich.console import Group

    where = [("folder", str(made.folder))] if made.folder is not None else []
    left = [*map(str, made.source.left_out), *made.source.left_files()]
    below = [*where, *(("left out", line) for line in left)]
    head = headline(made.plan.label, made.plan.recipe.title, width)
    return Group(head, *_parts(made.report, width), *([named_lines(below)] if below else []))


def render_report(report: Report, *, width: int = 1000) -> RenderableType:
    """A row for each group of like layers, with the error of their weights and, with calibration text, of their outputs."""
    from rich.console import Group
    from rich.text import Text

    return Group(Text(report.recipe, style="bold"), *_parts(report, width))


def _parts(report: Report, width: int) -> list[RenderableType]:
    def alike(layer: LayerReport) -> Any:
        return pattern_of(layer.name), layer.format, layer.keep

    groups = grouped(report.layers, alike)
    measured = any(layer.output is not None for layer in report.layers)
    headings = ["tensor", "count", "became", "bits/\nweight", "error %", *(_OUTPUTS if measured else ())]
    stays = [i for i, group in enumerate(groups) if group[0].format is None]
    rows = [_row(group, measured) for group in groups]
    table = table_or_list(headings, rows, width, expendable=_LESS, left=("tensor", "became"), dim=stays)
    return [table, named_lines(_lines(report, measured))]


_LESS = (
    "count",
    "bits/\nweight",
    "rounded to\nnearest %",
    "error %",
)  # what a narrow table does without, the least missed first
_OUTPUTS = ("output\nerror %", "rounded to\nnearest %")


def _row(group: Sequence[LayerReport], measured: bool) -> list[str]:
    """The cells of layers that became alike: errors are means over them."""
    first = group[0]
    bits = sum(layer.bits_per_weight for layer in group) / len(group)
    cells = [span_text([layer.name for layer in group]), str(len(group))]
    cells += [first.format if first.format is not None else f"stays: {first.keep}", f"{bits:.2f}"]
    cells.append(_percent([layer.error for layer in group]) if first.format is not None else _NONE)
    if measured:
        outputs = [layer.output for layer in group if layer.output is not None]
        cells += [_percent([o.final for o in outputs]), _percent([o.nearest for o in outputs])]
    return cells


def _percent(shares: Sequence[float]) -> str:
    return num(100 * sum(shares) / len(shares), 3) if shares else _NONE


def _lines(report: Report, measured: bool) -> list[tuple[str, str]]:
    times = report.bytes_before / max(1, report.bytes_after)
    lines = [
        ("quantized", f"{100 * report.coverage:.2f} % of the parameters"),
        ("size", f"{bytes_text(report.bytes_before)} -> {bytes_text(report.bytes_after)}, {times:.1f} times smaller"),
        (
            "bits per weight",
            f"{report.bits_per_weight:.3f} in all, {report.linear_bits_per_weight:.3f} in linear layers",
        ),
        ("error", f"|w - w'| / |w|, the mean over the tensors of a row{_OF_OUTPUTS if measured else ''}"),
    ]
    worst = sorted((layer for layer in report.layers if layer.error > 0), key=lambda layer: -layer.error)[:_WORST]
    if len(worst) > 1:
        lines += [
            ("largest errors" if i == 0 else "", f"{100 * layer.error:.3g} %  {layer.name}")
            for i, layer in enumerate(worst)
        ]
    if report.calibration is not None:
        lines.append(("text", _text(report.calibration)))
    notes = Counter(layer.note for layer in report.layers if layer.note)
    lines += [("note", f"{count} tensor{'s' * (count != 1)}: {note}") for note, count in notes.items()]
    warnings = [f"{name}: {text}" for name, text in report.warnings.items()]
    lines += [("warning", text) for text in warnings[:_WARNED]]
    if len(warnings) > _WARNED:
        lines.append(("warning", f"and {len(warnings) - _WARNED} more tensors; report.warnings names all"))
    return lines


_OF_OUTPUTS = "; output error: |x (w - w')'| / |x w'| on the calibration text, beside that of rounding to nearest"


def _text(calibration: dict[str, Any]) -> str:
    """What the report says of the calibration text."""
    known = {name: calibration[name] for name in ("name", "windows", "tokens") if name in calibration}
    return ", ".join(f"{value:,} {name}" if isinstance(value, int) else str(value) for name, value in known.items())
