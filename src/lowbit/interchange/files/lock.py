"""One writer at a time: who writes a folder or file locks it first, and whoever comes second is told at once.

The system takes the lock back when the process ends, however it ends: `flock` on POSIX, `msvcrt` on Windows,
on an empty hidden file beside the output. That file is removed with the lock; one that a killed process left is taken over.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from lowbit.errors import OutputError
from lowbit.interchange.files.undisturbed import undisturbed

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # some network file systems


@contextmanager
def locked(out: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Nobody else writes `out` until the end of the block. Folders above it that are missing are made, and go if still empty.

    OutputError when another run, in this process or any other, has locked it, unless `wait`; and when the place cannot be
    written to.
    """
    if not str(out):
        raise OutputError("the name of what to write is empty; give one")
    lock: int | None = None
    created: list[Path] = []
    try:
        out = Path(out).resolve()
        file = out.with_name(f".{out.name}.lowbit-lock")
        with nullcontext() if wait else undisturbed():  # waiting can be long, and must be possible to stop
            created = _create_folders(out.parent)
            try:
                lock = _acquired(file, wait)
            except BaseException:
                _remove_empty(created)
                raise
    except KeyboardInterrupt:  # one that had to wait
        if lock is not None:
            _let_go(lock, file, created)
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
        raise OutputError(
            f"cannot write {out}: {getattr(error, 'strerror', None) or error}; check the path and its permissions"
        ) from error
    if lock is None:
        raise OutputError(f"another run is writing {out}; wait for its end, or give another name")
    try:
        yield
    finally:
        _let_go(lock, file, created)


def _let_go(lock: int, file: Path, created: list[Path]) -> None:
    with undisturbed():
        _release(lock, file)
        _remove_empty(created)


def _acquired(file: Path, wait: bool) -> int | None:
    """A descriptor that holds the lock, None where another does."""
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(lock, wait):
                os.close(lock)
                return None
            # Who had the lock before may have removed the file since it was opened here: then this lock is of no file.
            with contextlib.suppress(FileNotFoundError):
                if sys.platform == "win32" or os.path.samestat(os.fstat(lock), os.stat(file)):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


if sys.platform == "win32":
    import msvcrt

    def _lock(file: int, wait: bool) -> bool:
        while True:
            try:
                msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError:
                if not wait:
                    return False
            else:
                return True

    def _release(file: int, path: Path) -> None:
        os.close(file)
        with contextlib.suppress(OSError):  # the next one has it open
            os.unlink(path)

else:
    import fcntl

    def _lock(file: int, wait: bool) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        return True

    def _release(file: int, path: Path) -> None:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(file)


def _create_folders(folder: Path) -> list[Path]:
    """Create `folder` and those above it; returns the ones that were missing, the innermost first."""
    missing = []
    at = folder
    while not at.exists():
        missing.append(at)
        at = at.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
