"""Names on the disk: what may be written where, and how what is finished takes the place of what was there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from lowbit.errors import OutputError
from lowbit.interchange.files.atomic import sync
from lowbit.interchange.files.undisturbed import undisturbed

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or what one file may have
_THEIR_CODE = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust say it


class TakenError(OutputError):
    """A place that has something else in it."""


def os_error_of(error: BaseException | None) -> OSError | None:
    """The error of the system that an exception is or tells of, None for any other."""
    if isinstance(error, OSError):
        return error
    found = _THEIR_CODE.search(str(error)) if isinstance(error, Exception) else None
    return None if found is None else OSError(int(found[1]), os.strerror(int(found[1])))


def check_apart(model: Path, out: Path) -> None:
    """OutputError when writing `out` would replace the model that is read, or stand among its files."""
    if not model.exists():
        return
    try:
        source, target = model.resolve(), out.resolve()
    except (OSError, RuntimeError) as error:  # symbolic links in a circle
        raise OutputError(f"cannot write {out}: {error}; give another name") from None
    if target in (source, *source.parents):
        raise OutputError(f"{out} holds the model that is read; give another name")
    if source.is_dir() and source in target.parents:
        raise OutputError(f"{out} is inside the folder of the model that is read; give a name outside of {model}")


def partial_of(out: Path) -> Path:
    """Where the folder `out` is made."""
    return out.with_name(out.name + ".partial")


def replace_folder(fresh: Path, out: Path) -> None:
    """Give the finished folder `fresh` the name `out`. What was there is set aside under a hidden name, and removed last."""
    with undisturbed():
        remove_replaced(out)
        if out.exists():
            os.rename(out, _aside(out))
        os.rename(fresh, out)
        sync(out.parent)
        remove_replaced(out)


def remove_replaced(out: Path) -> None:
    """Remove what a run that was killed had set aside to put the folder `out` in its place."""
    if _aside(out).exists():
        shutil.rmtree(_aside(out))


def remove_folder(folder: Path) -> None:
    """Remove a folder, and what a killed run left of removing it: first its name, so that nobody takes half of it for it."""
    gone = folder.with_name(f".{folder.name}.lowbit-removed")
    with undisturbed():
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.lowbit-replaced")
