"""Names of folders and files beside one that is not there, for people who misspelt it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

_LOOKED_AT = 1000  # names of a folder


def near_names(name: str, others: Iterable[str] = ()) -> str:
    """`; did you mean 'models/small'?` for a path whose folder has a name like it, and for one of `others`; empty without."""
    path = Path(name)
    try:
        with os.scandir(path.parent) as entries:
            found = [e.name for e in islice(entries, _LOOKED_AT) if e.is_dir() or e.name.endswith(".gguf")]
    except (OSError, ValueError):
        found = []
    before = name[: len(name.rstrip("/")) - len(path.name)]
    known = [*(before + each for each in found if not each.startswith(".")), *others]
    close = difflib.get_close_matches(name.rstrip("/"), known, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
