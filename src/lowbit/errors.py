"""Every error that lowbit raises on purpose.

    LowbitError
    ├── FormatError     a format text or value that means nothing
    ├── RecipeError     a recipe, preset or option that cannot be followed
    ├── SourceError     a model, file or tokenizer that cannot be read
    ├── WeightError     a tensor whose values cannot be quantized
    ├── TransformError  a model that a transform cannot rewrite
    ├── EngineError     a model or prompt that the fast engine does not compute
    ├── ExportError     a model that a target format cannot hold
    ├── OutputError     a place that cannot be written to
    └── TextError       evaluation text that cannot be used

A message says what is wrong, where, and what to do about it. The command line prints
it on one line and exits with code 2; nothing half-written is left behind.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LowbitError(Exception):
    """Base of all errors that a user can mend."""


class FormatError(LowbitError, ValueError):
    """A format that does not parse or cannot hold what is asked of it."""


class RecipeError(LowbitError, ValueError):
    """An unknown preset, a wrong option, a composition that makes no sense."""


class SourceError(LowbitError):
    """A model that cannot be found, read, or trusted."""


class WeightError(LowbitError, ValueError):
    """A tensor that cannot be quantized, named."""


class TransformError(LowbitError, ValueError):
    """A model whose architecture a transform does not know or cannot rewrite."""


class EngineError(LowbitError, ValueError):
    """A model or prompt that the fast engine does not compute; transformers may."""


class ExportError(LowbitError, ValueError):
    """A model that a target of an export cannot hold, or one that came back other than it was written."""


class OutputError(LowbitError):
    """A folder or file that cannot be written."""


class TextError(LowbitError, ValueError):
    """Evaluation text that cannot be read or is too short."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'a' or 'b'?` for a misspelt word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
