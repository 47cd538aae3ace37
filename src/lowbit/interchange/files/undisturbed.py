"""Steps that must not stop half way: an interruption waits until they are done.

Who presses Ctrl-C twice, or whose queue sends SIGTERM after SIGINT, would otherwise stop the very removal of what the first
signal left over.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def undisturbed() -> Iterator[None]:
    """SIGINT and SIGTERM that arrive within the block act at its end, the last of them once. For short steps on files.

    Where an interruption is what the block cleans up after, another adds nothing and is dropped, with what the first one notes kept.

    Handlers are those that were set, so that a program that takes no notice of a signal takes none after the block either. In
    another thread than the main one, which gets no signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    already = isinstance(sys.exc_info()[1], KeyboardInterrupt)
    came: list[tuple[int, Any]] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if callable(handler):  # one that raises; the default of SIGTERM ends the process at once, and is left alone
                before[number] = handler
                signal.signal(number, lambda number, frame: came.append((number, frame)))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came and not already:
            before[signal.Signals(came[-1][0])](*came[-1])


@contextmanager
def temporary_folder(prefix: str = "lowbit-", place: Path | None = None) -> Iterator[Path]:
    """A new folder in `place`, or where the system keeps such, which is removed at the end of the block, however that comes."""
    folder = None
    try:
        with undisturbed():
            folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        yield folder
    except BaseException as error:
        if folder is not None:
            forget(folder, error)
        raise
    finally:
        with undisturbed():
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def forget(folder: Path, error: BaseException) -> None:
    """Take notes off an error that name files in a folder that is removed: they promise what is not kept."""
    places = {str(folder), str(folder.resolve())}
    notes = getattr(error, "__notes__", [])
    notes[:] = [note for note in notes if not any(place in note for place in places)]
