"""Adapters by name, from what people give: one folder, several, or folders by names of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.adapters.adapter import Adapter, open_adapter
from lowbit.adapters.source import check_belongs
from lowbit.errors import RecipeError

Given = str | Path | Sequence[str | Path] | Mapping[str, str | Path] | None


def named_adapters(given: Given, model: Any) -> dict[str, Adapter]:
    """The adapters for `model` by name, opened and no value read. A text may be NAME=FOLDER; else the name is that of the folder.

    RecipeError for two of one name, SourceError as `open_adapter`.
    """
    if given is None:
        return {}
    each = [given] if isinstance(given, (str, Path)) else given
    pairs = list(each.items()) if isinstance(each, Mapping) else [_pair(one) for one in each]
    found: dict[str, Adapter] = {}
    for name, place in pairs:
        if name in found:
            raise RecipeError(f"two adapters are called {name!r}; give one of them a name of its own, as other={place}")
        found[name] = open_adapter(place)
        check_belongs(model, found[name])
    return found


def _pair(given: str | Path) -> tuple[str, str | Path]:
    """(name, folder)."""
    if isinstance(given, str) and not Path(given).exists():
        name, equals, place = given.partition("=")
        if equals and name and place:
            return name, place
    return Path(given).name or str(given), given
