"""What `doctor` found, drawn: lines, a table of kernels for each type of inputs, and why kernels decline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lowbit.report.doctor import OPERATORS, OPTIONAL, ROWS, SIDE, EngineState, KernelTrial, Report
from lowbit.report.layout import Lines, named_lines, table_or_list, wrapped
from lowbit.report.wording import bytes_text, grouped

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


def render_report(report: Report, *, every: bool = False, width: int = 80) -> RenderableType:
    """The report as lines, the kernels that are used for each recipe or `every` one that could be, and why kernels decline."""
    from rich.console import Group
    from rich.text import Text

    elements: list[RenderableType] = [named_lines(_lines(report))]
    if report.kernels:
        few, many = (_rows_text(rows) for rows in (ROWS[0], ROWS[-1]))
        head = Text.assemble(("Kernels", "bold"), f"\n{_INTRODUCTION.format(side=SIDE, few=few, many=many)}")
        elements += [Text(), Lines([*wrapped(head, width), Text()]), *_kernel_tables(report, every, width)]
        if not every:
            elements.append(Lines([*wrapped(Text(_SLOWER, "dim"), width), Text()]))
        elements.append(Lines(_declines(report, width)))
    return Group(*elements)


_INTRODUCTION = (
    "Microseconds for the product of a weight of {side} x {side} with {few} of inputs (a new token) and with {many} (a prompt), "
    "by the kernel that lowbit uses, which is the fastest; and that speed as a multiple of the float product of PyTorch."
)
_SLOWER = "`lowbit doctor --all` also lists the slower kernels."


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


def _rows_text(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _kernel_tables(report: Report, every: bool, width: int) -> list[RenderableType]:
    """For each type of inputs what the float product takes, and a table of the kernels that are used, or of `every` one."""
    from rich.text import Text

    headings = ("recipe", "kernel", *(f"µs for\n{_rows_text(rows)}" for rows in ROWS), "used\nfor")
    elements: list[RenderableType] = []
    for trials in grouped(report.kernels, lambda t: t.dtype):
        dense = next(t.microseconds for t in trials if t.kernel == "dense")
        taken = ", ".join(f"{us:.0f} µs for {_rows_text(rows)}" for us, rows in zip(dense, ROWS, strict=True))
        line = Text.assemble((f"inputs in {trials[0].dtype}", "cyan"), f"  the float product takes {taken}")
        able = [t for t in trials if t.declines is None and t.kernel != "dense"]
        rows = [_cells(t, dense) for t in able if t.chosen_for or every]
        elements += [Lines(wrapped(line, width)), table_or_list(headings, rows, width, left=_LEFT)]
    return elements


_LEFT = ("recipe", "kernel", "used\nfor")


def _cells(trial: KernelTrial, dense: tuple[float, ...]) -> list[str]:
    speeds = [f"{us:.0f}  {_ratio(d / us):>4} x" for us, d in zip(trial.microseconds, dense, strict=True)]
    used = "both" if trial.chosen_for == ROWS else " and ".join(map(_rows_text, trial.chosen_for))
    return [trial.recipe, trial.kernel, *speeds, used]


def _ratio(times: float) -> str:
    return f"{times:.1f}" if times >= 1 else f"{times:.2f}"


def _declines(report: Report, width: int) -> list[Text]:
    """Why kernels take no weight of a recipe, as lines."""
    from rich.text import Text

    reasons: dict[tuple[str, str], list[str]] = {}
    for trial in report.kernels:
        if trial.declines is not None:
            recipes = reasons.setdefault((trial.kernel, trial.declines), [])
            if trial.recipe not in recipes:
                recipes.append(trial.recipe)
    lines = [Text("Kernels that take no weight of a recipe, and why", "bold")] if reasons else list[Text]()
    for (kernel, reason), recipes in reasons.items():
        lines += wrapped(Text.assemble((f"{kernel} declines {', '.join(recipes)}: ", "cyan"), reason), width)
    return lines
