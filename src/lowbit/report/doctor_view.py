"""What `doctor` found, drawn: lines, a table of kernels, and why kernels decline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.report.doctor import OPERATORS, OPTIONAL, ROWS, SIDE, EngineState, Report
from lowbit.report.layout import named_lines
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from rich.console import RenderableType


def render_report(report: Report) -> RenderableType:
    """The report as lines, a table of kernels, and why kernels decline."""
    from rich.console import Group
    from rich.text import Text

    elements: list[RenderableType] = [named_lines(_lines(report))]
    if report.kernels:
        elements += [Text(), _kernel_table(report), _declines(report)]
    return Group(*elements)


def _lines(report: Report) -> list[tuple[str, str]]:
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in report.versions.items())
    paths = [f"{name} {'yes' if here else 'no'} ({OPERATORS[name]})" for name, here in report.operators.items()]
    memory = "not known" if not report.memory else bytes_text(report.memory)
    if report.memory_free:
        memory += f", {bytes_text(report.memory_free)} available"
    optional = [
        f"{name}: {'installed' if here else f'not installed, for {OPTIONAL[name]}'}"
        for name, here in report.optional.items()
    ]
    return [
        ("versions", f"Python {report.python}, {versions}"),
        ("machine", report.machine),
        ("vector units", " ".join(report.features) or "none that is known"),
        ("threads", f"{report.threads} used, {report.usable_cores} of {report.cores} cores usable"),
        ("bfloat16", "in hardware" if report.bfloat16 else "emulated: float32 may be faster here"),
        ("accelerator", report.accelerator or "none that PyTorch can use"),
        ("memory", memory),
        ("disk", f"{bytes_text(report.disk_free)} free in {Path.cwd()}"),
        ("engine", _engine_line(report.engine)),
        *(("C++ core" if i == 0 else "", line) for i, line in enumerate(_core_lines(report.core))),
        *(("PyTorch has" if i == 0 else "", path) for i, path in enumerate(paths)),
        *(("optional" if i == 0 else "", line) for i, line in enumerate(optional)),
    ]


def _engine_line(engine: EngineState) -> str:
    if not engine.runs:
        return f"does not run here, transformers does: {engine.reason}"
    slow = "; slow, as there are no kernels for this processor's vector units" if engine.isa == "portable" else ""
    return f"runs here: {engine.isa}, {engine.threads} thread{'s' * (engine.threads != 1)}{slow}"


def _core_lines(core: dict[str, str]) -> list[str]:
    return [core["absent"]] if "absent" in core else [f"{isa}: {state}" for isa, state in core.items()]


def _kernel_table(report: Report) -> RenderableType:
    from rich import box
    from rich.table import Table

    dense = {t.dtype: t.microseconds for t in report.kernels if t.kernel == "dense"}
    title = f"Kernels on a weight of {SIDE} x {SIDE}: microseconds, and times as fast as dense"
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", title=title, title_justify="left", padding=(0, 1))
    for name in ("recipe", "activations", "kernel"):
        table.add_column(name, no_wrap=True)
    for rows in ROWS:
        table.add_column(f"{rows} row" + ("s" if rows > 1 else ""), justify="right", no_wrap=True)
    table.add_column("chosen for", no_wrap=True)
    for trial in report.kernels:
        if trial.declines is not None:
            continue
        cells = [
            f"{t:.0f}" + ("" if trial.kernel == "dense" else f"  {d / t:5.2f} x")
            for t, d in zip(trial.microseconds, dense[trial.dtype], strict=True)
        ]
        chosen = " and ".join("1 row" if rows == 1 else f"{rows} rows" for rows in trial.chosen_for)
        style = "dim" if trial.kernel == "dense" else ""
        table.add_row(trial.recipe, trial.dtype, trial.kernel, *cells, chosen, style=style)
    return table


def _declines(report: Report) -> RenderableType:
    from rich.text import Text

    reasons: dict[tuple[str, str], list[str]] = {}
    for trial in report.kernels:
        if trial.declines is not None:
            recipes = reasons.setdefault((trial.kernel, trial.declines), [])
            if trial.recipe not in recipes:
                recipes.append(trial.recipe)
    text = Text()
    for (kernel, reason), recipes in reasons.items():
        text.append(f"{kernel} declines {', '.join(recipes)}: ", "cyan").append(f"{reason}\n")
    text.rstrip()
    return text
