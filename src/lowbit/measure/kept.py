"""What a measurement has found so far, in a folder, so that the same measurement goes on from there when it was killed.

It counts only for the same measurement: everything that decides a figure (both models, the text, versions) is written beside it, and where
that differs the folder begins anew. Finished windows are kept as the figures of each token, so that the end says the same to the digit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lowbit.errors import OutputError
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.lock import locked
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.files.undisturbed import undisturbed
from lowbit.measure.windows import Tokens

T = TypeVar("T")
Figures = dict[str, np.ndarray]
"""What one window showed: by name, such as "nll", float64 of each scored token."""

_ABOUT, _FOUND = "about.json", "found.json"
_VERSION = 1
_log = logging.getLogger("lowbit")


class Kept:
    """One measurement's folder; without one nothing is kept. Made by `kept_in`."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def part(self, name: str) -> Kept:
        """A folder in it, for a part of the measurement."""
        if self.folder is None:
            return self
        inner = self.folder / name
        inner.mkdir(exist_ok=True)
        return Kept(inner)

    def has(self, name: str) -> bool:
        """Whether `part` of this name was begun."""
        return self.folder is not None and (self.folder / name).is_dir()

    def figures(self, count: int) -> dict[int, Figures]:
        """The windows among the first `count` that are finished, by their numbers."""
        found = {}
        for index in range(count if self.folder is not None else 0):
            figures = self._window(index)
            if figures is not None:
                found[index] = figures
        return found

    def add(self, index: int, figures: Mapping[str, np.ndarray]) -> None:
        """A window is finished."""
        if self.folder is None:
            return
        file = self._file(index)
        fresh = file.with_name(file.name + ".part")
        with _losing_nothing(self.folder):
            with fresh.open("wb") as stream:
                np.savez(stream, **figures)  # type: ignore[arg-type]
            replace_file(fresh, file)

    def found(self, name: str, find: Callable[[], T]) -> T:
        """What is kept by this name, plain data; else what `find` gives, which is kept from now on."""
        if self.folder is None:
            return find()
        known = _read(self.folder / _FOUND)
        if name in known:
            return known[name]  # type: ignore[no-any-return]
        value = find()
        with _losing_nothing(self.folder):
            _write(self.folder / _FOUND, {**known, name: value})
        return value

    @property
    def is_empty(self) -> bool:
        """Whether nothing is kept that a later run could go on from."""
        return self.folder is None or not any(each.name != _ABOUT for each in self.folder.iterdir())

    def _file(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"window-{index:06d}.npz"

    def _window(self, index: int) -> Figures | None:
        try:
            with np.load(self._file(index), allow_pickle=False) as stored:
                return {name: np.asarray(stored[name], dtype=np.float64) for name in stored.files}
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # it is measured again


NOTHING_KEPT = Kept()


@dataclass(frozen=True)
class Keeping:
    """Where what is measured is kept, a folder or nowhere, and what is known to decide figures before the text is read."""

    place: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def on(self, tokens: Tokens, **how: Any) -> AbstractContextManager[Kept]:
        """`kept_in` for a measurement on a text; how: what else decides figures, plain data."""
        ids = hashlib.sha256(tokens.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()
        frame = [list(tokens.frame.before), list(tokens.frame.after)]
        return kept_in(self.place, {**self.about, "text": ids, "frame": frame, **how})


KEPT_NOWHERE = Keeping()


@contextmanager
def kept_in(place: Path | None, about: Mapping[str, Any]) -> Iterator[Kept]:
    """The folder `place` for a measurement of which `about`, plain data, decides the figures; it is removed when the block ends well.

    An error, Ctrl-C included, leaves it where something is kept, and notes so. None, a place that cannot be written to and one that
    another run is using keep nothing.
    """
    if place is None:
        yield NOTHING_KEPT
        return
    lock = contextlib.ExitStack()
    try:
        lock.enter_context(locked(place))
        kept = _begun(place, json.loads(json.dumps({"lowbit_measuring": _VERSION, **about})))
    except (OutputError, OSError):
        lock.close()
        yield NOTHING_KEPT
        return
    with lock:
        try:
            yield kept
        except BaseException as error:
            if kept.is_empty:
                _remove(place)
            else:
                error.add_note(f"what was measured so far is kept in {place}, and the same command goes on from there")
            raise
        _remove(place)


def place_of(model: str | Path) -> Path | None:
    """Where a command keeps what it measures, hidden: beside a folder that lowbit wrote, else in the current folder. None where nothing
    can be written there."""
    folder = Path(model).resolve() if is_ours(model) else Path.cwd() / (Path(model).name or "model")
    place = folder.with_name(f".{folder.name}.lowbit-measuring")
    return place if os.access(place.parent, os.W_OK) else None


def _begun(place: Path, about: dict[str, Any]) -> Kept:
    if _read(place / _ABOUT) != about:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        _write(place / _ABOUT, about)
    return Kept(place)


def _remove(place: Path) -> None:
    with undisturbed():
        shutil.rmtree(place, ignore_errors=True)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(file: Path, value: Any) -> None:
    fresh = file.with_name(file.name + ".part")
    fresh.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    replace_file(fresh, file)


@contextmanager
def _losing_nothing(folder: Path) -> Iterator[None]:
    """A disk that is full costs what would be kept, and not the measurement."""
    try:
        yield
    except OSError as error:
        _log.warning("%s cannot be written (%s), so this part is not kept", folder, error.strerror or error)
