"""Rows of a comparison in a file, written as each is finished, so that an interrupted comparison goes on from them.

The file is JSON: by the hash of everything that decides a figure but the recipe (the model, the windows of text, the calibration text,
versions; where speed is measured the machine), the cards by recipe. A row counts only where all of that is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.files.atomic import replace_file
from lowbit.measure.card import Card

FLOAT = ""  # in place of a recipe: the float model
_VERSION = 1
_log = logging.getLogger("lowbit")


class RowFile:
    """The file `path`. OutputError where none can be written, SourceError where it is something else."""

    def __init__(self, path: str | Path) -> None:
        self.path, self._run, self._facts = Path(path), "", {}  # type: ignore[var-annotated]
        self._cards: dict[str, Card] = {}
        folder = self.path.parent
        if self.path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise OutputError(f"finished rows cannot be kept in {path}; name a file in a folder that can be written to")
        self._read()

    def of(self, facts: Mapping[str, Any]) -> None:
        """From now on it is about comparisons of which `facts` decide the figures."""
        self._facts = json.loads(json.dumps(facts))
        self._run = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()
        rows = self._read().get(self._run, {}).get("rows", {})
        try:
            self._cards = {recipe: Card.from_json(json.dumps(card)) for recipe, card in rows.items()}
        except SourceError:
            raise self._damaged() from None

    def card(self, recipe: str) -> Card | None:
        """What was measured of a recipe, by its full text."""
        return self._cards.get(recipe)

    def add(self, recipe: str, card: Card) -> None:
        """Keep what was measured. A file that cannot be written any more is a warning: the comparison is worth more."""
        self._cards[recipe] = card
        runs = self._read()
        rows = {name: one.to_dict() for name, one in self._cards.items()}
        try:
            self._write({**runs, self._run: {"about": self._facts, "rows": rows}})
        except OSError as error:
            _log.warning("%s cannot be written (%s), so finished rows are not kept", self.path, error.strerror or error)

    def forget(self) -> None:
        """Take the rows of this comparison out again, and the file away where it holds no others."""
        runs = {run: rows for run, rows in self._read().items() if run != self._run}
        with contextlib.suppress(OSError):  # it is only left behind
            if runs:
                self._write(runs)
            else:
                self.path.unlink(missing_ok=True)

    @contextmanager
    def noted(self, recipes: list[str]) -> Iterator[None]:
        """An error, Ctrl-C included, notes how many of the recipes are kept here."""
        try:
            yield
        except BaseException as error:
            done = sum(recipe in self._cards for recipe in recipes)
            if done and self.path.is_file():
                error.add_note(
                    f"{done} of {len(recipes)} recipes {'is' if done == 1 else 'are'} kept in {self.path}, and the same command goes on from there"
                )
            raise

    def _read(self) -> dict[str, Any]:
        """Rows by comparison; nothing where there is no file."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            runs = content["runs"]
            sound = content["lowbit_compare"] == _VERSION and all(
                isinstance(run["rows"], dict) for run in runs.values()
            )
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise SourceError(f"{self.path} cannot be read: {error.strerror}; name another file") from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged() from None
        if not sound:
            raise self._damaged()
        return dict(runs)

    def _damaged(self) -> SourceError:
        return SourceError(f"{self.path} does not hold rows of this version's compare; remove it, or name another file")

    def _write(self, runs: Mapping[str, Any]) -> None:
        fresh = self.path.with_name(self.path.name + ".part")
        try:
            text = json.dumps({"lowbit_compare": _VERSION, "runs": runs}, indent=1, ensure_ascii=False, allow_nan=False)
            fresh.write_text(text + "\n", encoding="utf-8")
            replace_file(fresh, self.path)
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
