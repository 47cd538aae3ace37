"""What a person can type instead, where an exporter cannot hold a model: a command whose plan has been checked."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowbit.convert.preparing import planned
from lowbit.errors import LowbitError
from lowbit.formats import Format
from lowbit.formats.grids import IntGrid
from lowbit.interchange.exporters.exporter import Exporter
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.source import Source
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe

MODEL = "MODEL"  # stands for the float model, where only the quantized folder is known
_BY_BITS = {1: "w2", 2: "w2", 3: "w3", 4: "w4"}


def command_for_folder(kind: Exporter, folder: LowbitFolder) -> str:
    """The command that makes a file of `kind` from the float model of a folder, as near to the folder as `kind` has; "" for none."""
    made = _manifest(folder.folder)
    known = made.get("recipe")
    name = known.get("name") if isinstance(known, dict) else None
    formats = Counter[Format]()
    for t in folder.contents.tensors.values():
        if t.format is not None and t.is_multiplied:
            formats[t.format] += t.count
    base = formats.most_common(1)[0][0] if formats else None
    return command(kind, folder.dense(), MODEL, name, base, calibrated="calibration" in made)


def command(
    kind: Exporter, source: Source, model: str, recipe: str | None, base: Format | None, calibrated: bool
) -> str:
    """The first of the presets near to `recipe` and to its format `base` that `kind` can hold of a model, as a command; "" for none.

    One that needs other formats for some shapes comes after those that do not: it is not what its name says.
    """
    altered = ""
    for text in dict.fromkeys(_near(recipe, base)):
        with contextlib.suppress(LowbitError):
            ready = planned(kind, source, text, calibrated)
            looks = " --calibration builtin" if calibrated and ready.recipe.uses_calibration else ""
            found = f"lowbit quantize {shlex.quote(model)} {text} --as {kind.name}{looks}"
            if not ready.changes:
                return found
            altered = altered or found
    return altered


def base_of(recipe: str | Recipe) -> tuple[str | None, Format | None]:
    """The name of a recipe, where it is a preset's, and its format."""
    with contextlib.suppress(LowbitError):
        parsed = Recipe.of(recipe)
        return parsed.name, parsed.format
    return None, None


def _near(recipe: str | None, base: Format | None) -> Iterator[str]:
    """Names of presets, the nearest first."""
    if recipe in PRESETS:
        yield str(recipe)
    if base is not None:
        if base.grid.bits == 4 and not isinstance(base.grid, IntGrid):
            yield "nl4"
        yield _BY_BITS.get(base.grid.bits, "w8")
    yield from ("w4", "w8")


def _manifest(folder: Path) -> dict[str, Any]:
    """What a folder says of how it was made; empty where it does not, or not readably."""
    try:
        found = json.loads((folder / MANIFEST).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
