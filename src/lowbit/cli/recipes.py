"""lowbit recipes"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from lowbit.cli import console
from lowbit.cli.options import Json

if TYPE_CHECKING:
    from rich.console import RenderableType

    from lowbit.solvers import Method


def register(app: typer.Typer) -> None:
    app.command(epilog="Example:  lowbit recipes --json")(recipes)


def recipes(as_json: Json = False) -> None:
    """List the presets, what each stands for, and the methods that recipes are built from."""
    from lowbit.formats.parsing import NAMED
    from lowbit.recipes.activation_rules import FALLBACK
    from lowbit.recipes.presets import PRESETS
    from lowbit.recipes.recipe import Recipe  # which also announces transforms and tuners
    from lowbit.solvers.ranges.estimator import estimators, options_of
    from lowbit.solvers.registry import methods

    if as_json:
        presets = {
            n: {
                "recipe": p.text,
                "with_calibration": str(Recipe.parse(n).calibrated()),
                "about": p.about,
                "source": p.source,
            }
            for n, p in PRESETS.items()
        }
        found = {n: {"kind": m.kind, "summary": m.summary, "options": m.options} for n, m in methods().items()}
        console.print_json(
            {
                "presets": presets,
                "methods": found,
                "formats": NAMED,
                "ranges": {n: options_of(k) for n, k in estimators().items()},
                "fallback": f"{FALLBACK}:over={FALLBACK.over:g}",
            }
        )
        return
    ranges = ", ".join(f"{n}({_pairs(options_of(k))})".removesuffix("()") for n, k in estimators().items())
    screen = console.stdout()
    rows = [
        (n, p.text + (f"\nwith calibration text: {p.calibrated}" if p.calibrated else ""), p.about, p.source)
        for n, p in PRESETS.items()
    ]
    screen.print(_table("Presets", ("name", "stands for", "what it is", "from"), rows))
    rows = [(n, m.kind, m.summary, _options(m)) for n, m in methods().items()]
    screen.print(_table("Methods", ("name", "kind", "what it does", "options"), rows))
    screen.print(_table("Formats with a name of their own", ("name", "stands for"), list(NAMED.items())))
    screen.print(
        "A recipe is a preset, a format (int4:g32), METHOD@FORMAT, or any of these with settings:\n"
        "  search@int4:g32,embed=int6:g64,*.down_proj=int8:channel,*.layers.0.*=keep\n"
        "Inputs of linear layers in few bits: a= for all, a:GLOB= for some; static ranges name an estimator, and layers whose\n"
        f"range explodes on the text fall back to dynamic ones (fallback={FALLBACK}:over={FALLBACK.over:g} unless given; never):\n"
        "  smooth+search@int8:channel,a=minmax@int8:tensor,a:*.down_proj=int8:g64,a:*.layers.0.*=float\n"
        f"Estimators of ranges: {ranges}",
        markup=False,
    )


def _options(method: Method) -> str:
    return _pairs(method.options)


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={default}" for name, default in options.items())


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
