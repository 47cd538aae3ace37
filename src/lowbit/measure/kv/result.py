"""CacheCheck: what a check of the cache found, as a value that prints as a screen and goes to JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from lowbit.display import Displayed
from lowbit.kv import CacheFormat
from lowbit.measure.card import TextMark, json_ready
from lowbit.measure.kv.figures import CacheFigures
from lowbit.measure.kv.sensitivity import Sensitivity
from lowbit.measure.kv.words import judged
from lowbit.measure.quality import Estimate


@dataclass(frozen=True)
class Recommended:
    """The fewest bits within a limit, verified as a whole. trials: how many choices were measured for it; None for `figures` where it
    stores everything exactly, because nothing else held."""

    format: str
    limit: float
    trials: int
    figures: CacheFigures | None

    @property
    def cache_format(self) -> CacheFormat:
        """The same as a value."""
        return CacheFormat.of(self.format)


@dataclass(frozen=True, repr=False)
class CacheCheck(Displayed):
    """Cache formats of one model beside its float cache, and what is recommended.

    rows: in the order asked. sensitivity: what each side of each layer would cost; None where no recommendation was asked. notes: what a
    reader must know of how it was measured.
    """

    model: str
    text: TextMark
    base_perplexity: Estimate
    rows: tuple[CacheFigures, ...]
    recommended: Recommended | None = None
    sensitivity: Sensitivity | None = None
    notes: tuple[str, ...] = ()

    def _brief(self) -> str:
        said = [] if self.recommended is None else [f"recommended {self.recommended.format}"]
        return ", ".join([self.model, *(row.format for row in self.rows), *said])

    @property
    def measured(self) -> tuple[CacheFigures, ...]:
        """All rows, the recommended one last."""
        more = self.recommended.figures if self.recommended is not None else None
        return self.rows if more is None or more.format in {row.format for row in self.rows} else (*self.rows, more)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings, with the words for each row."""
        data: dict[str, Any] = {
            "model": self.model,
            "context": self.text.length,
            "text": dataclasses.asdict(self.text),
            "base_perplexity": dataclasses.asdict(self.base_perplexity),
            "rows": [_row(row) for row in self.rows],
            "recommended": None,
            "sensitivity": None,
            "notes": list(self.notes),
        }
        if self.recommended is not None:
            figures = self.recommended.figures
            data["recommended"] = {
                "format": self.recommended.format, "kl_limit": self.recommended.limit, "trials": self.recommended.trials,
                "figures": None if figures is None else _row(figures),
            }  # fmt: skip
        if self.sensitivity is not None:
            data["sensitivity"] = [
                {
                    "layer": layer,
                    "side": which,
                    "measured": dict([self.sensitivity.alone[layer, which]]),
                    "kl": dict(kl),
                }
                for (layer, which), kl in sorted(self.sensitivity.kl.items())
            ]
        found: dict[str, Any] = json_ready(data)
        return found

    def to_json(self) -> str:
        """The same as text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _row(row: CacheFigures) -> dict[str, Any]:
    found = judged(row)
    return dataclasses.asdict(row) | {"verdict": found.word, "breaks": found.breaks, "words": list(found.sentences)}
