"""A file or a name that counts is on the disk whole, or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(fresh: Path, path: Path) -> None:
    """Give the finished file `fresh` the name `path`, in the same file system: a kill leaves what was there, or the new one."""
    sync(fresh)
    os.replace(fresh, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """What is written of a file, or a name in a folder, reaches the disk; Windows cannot be asked for the latter."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
