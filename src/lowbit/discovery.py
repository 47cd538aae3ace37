"""How methods, exporters, schemes and the like are found: whatever stands in their package registers itself when imported."""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from types import ModuleType


@cache
def modules_of(package: str) -> tuple[ModuleType, ...]:
    """Every module of a package, imported once, in alphabetical order."""
    path = import_module(package).__path__
    return tuple(import_module(f"{package}.{module.name}") for module in pkgutil.iter_modules(path))
