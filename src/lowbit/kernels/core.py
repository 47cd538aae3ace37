"""The one door to `lowbit._core`, the C++ part. Nothing is loaded before it is asked for."""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

from lowbit.version import __version__

_log = logging.getLogger("lowbit")
_NAME = "lowbit._core"
_HOME = Path(__file__).parents[1]
_MEND = "reinstall with a C++ compiler: pip install --force-reinstall --no-deps --no-cache-dir lowbit (from a checkout: pip install .)"


def core() -> ModuleType | None:
    """The C++ part, or None, which is said once in the log, because what wants it runs slower without."""
    module, reason = _loaded()
    if reason is not None:
        _say(reason)
    return module


def why_absent() -> str | None:
    """Why there is no C++ part and what to do about it, or None where it works."""
    return _loaded()[1]


@cache
def _say(reason: str) -> None:
    _log.warning("packed weights are multiplied by PyTorch alone, which is slower: %s", reason)


@cache
def _loaded() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(_NAME)
    except ModuleNotFoundError as error:
        if error.name != _NAME:
            raise
        return None, _not_built()
    except (ImportError, OSError) as error:
        return None, f"{_NAME} does not load ({error}); {_MEND}"
    built = getattr(module, "version", "an unknown version")
    if built != __version__:
        return None, f"{_NAME} was built from {built}, the package is {__version__}; {_MEND}"
    return module, None


def _not_built() -> str:
    """Tells a module for another Python from none at all."""
    others = sorted(p.name for p in _HOME.glob("_core*") if p.suffix in {Path(s).suffix for s in EXTENSION_SUFFIXES})
    if others:
        return f"{_HOME / others[0]} was built for another Python; {_MEND}"
    return f"built without: no C++ compiler, or no Python headers, when installed; {_MEND}"
