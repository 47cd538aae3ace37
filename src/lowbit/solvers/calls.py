"""`name(option=value,...)`: how recipes write methods with their options."""

from __future__ import annotations

from typing import Any

from lowbit.errors import RecipeError


def call_parts(text: str) -> tuple[str, tuple[tuple[str, float | int | str], ...]]:
    """Name and options of `name(option=value,...)`."""
    name, opened, inside = text.strip().partition("(")
    if not opened:
        return name, ()
    if not inside.endswith(")"):
        raise RecipeError(f"{text!r} opens a '(' that it does not close")
    options: list[tuple[str, Any]] = []
    for item in filter(None, inside[:-1].split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{item!r} in {text!r} is not OPTION=VALUE")
        options.append((key.strip(), _number(value.strip())))
    return name, tuple(options)


def _number(value: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
