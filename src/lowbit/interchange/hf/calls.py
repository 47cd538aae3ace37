"""Calls of other people's code with what a file says: whatever it raises becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lowbit.errors import LowbitError, SourceError


@contextmanager
def asking(who: str, where: str, what: str, remedy: str) -> Iterator[None]:
    """What `who` raises inside is a SourceError: "WHERE: WHO cannot WHAT (its words); REMEDY".

    Errors of lowbit and a lack of memory pass. A panic of a library in Rust is no Exception, and counts as an error too.
    """
    try:
        yield
    except (LowbitError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = f"{type(error).__name__}: " if isinstance(error, (KeyError, IndexError)) else ""
        raise SourceError(f"{where}: {who} cannot {what} ({said}{one_line(error)}); {remedy}") from error


def one_line(error: BaseException, limit: int = 300) -> str:
    """The text of an error from elsewhere on one line of at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
