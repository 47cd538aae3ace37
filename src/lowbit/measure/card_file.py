"""A card in the folder that it is about: `card.json`, with the command that measured it and what the weights looked like then.

The same command gives the same weights, and never the same timings: so `card.json` is no part of what makes two folders equal.
A folder comes from anywhere, so its card is read with limits.
"""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.errors import OutputError, SourceError
from lowbit.interchange.exporters.exporter import exporters
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.safetensors_reader import sampled
from lowbit.interchange.files.weights import weight_files
from lowbit.interchange.model_card import CARD_FILE
from lowbit.measure.card import Card
from lowbit.measure.scoring import MEANING

OWN = "lowbit"  # the target of lowbit's own folders; others are names of exporters
_TURNS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of text
_MOST_BYTES, _MOST_NUMBER, _DEEPEST = 4 << 20, 10**18, 12


@dataclass(frozen=True)
class SavedCard:
    """A card and the folder that it is about.

    target   whose format the folder has: lowbit, or what `--as` says, such as vllm
    command  what was typed to measure it, without the paths of that machine
    base     the float model, as it can be typed: a name on the hub, or of a folder
    weights  name of a weight file -> its bytes and the SHA-256 of 64 samples of it
    """

    card: Card
    target: str
    command: str
    base: str | None
    weights: Mapping[str, str]

    def to_json(self) -> str:
        """The text of `card.json`: the card's own fields, and `folder` for what is above."""
        folder = {
            "target": self.target, "command": self.command, "base": self.base, "weights": dict(self.weights),
        }  # fmt: skip
        return json.dumps({**self.card.to_dict(), "folder": folder}, indent=2, ensure_ascii=False) + "\n"

    def changed(self, folder: Path) -> tuple[str, ...]:
        """The weight files of `folder` that are not those that were measured."""
        now = fingerprints(folder)
        return tuple(sorted(name for name in {*now, *self.weights} if now.get(name) != self.weights.get(name)))


def fingerprints(folder: Path) -> dict[str, str]:
    """`SIZE:SHA-256 of samples` of every weight file, by name; reads 64 pieces of each. SourceError where there are none."""
    try:
        return {file.name: f"{file.stat().st_size}:{sampled(file)}" for file in weight_files(folder)}
    except OSError as error:
        raise SourceError(f"{folder}: cannot read the weights: {error.strerror or error}") from error


def save(folder: Path, saved: SavedCard) -> None:
    """Write `card.json` into a folder, whole or not at all. OutputError."""
    write_text(folder / CARD_FILE, saved.to_json())


def write_text(file: Path, text: str) -> None:
    """A file of a finished folder, whole or not at all. OutputError."""
    fresh = file.with_name(f".{file.name}.lowbit-new")
    try:
        fresh.write_text(text, "utf-8", newline="\n")
        replace_file(fresh, file)
    except OSError as error:
        raise OutputError(
            f"cannot write {file}: {error.strerror or error}; the model is whole, only this file is missing"
        ) from error


def load(folder: Path) -> SavedCard | None:
    """The card in a folder, None where there is none. SourceError for one that `save` did not write."""
    file = folder / CARD_FILE
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        data = _clean(json.loads(file.read_text("utf-8"), parse_int=_number), 0)
        card = Card.from_json(json.dumps(data))
        about = data["folder"]
        weights = {str(name): str(value) for name, value in about["weights"].items()}
        texts = [about["target"], about["command"], about["base"]]
        if not (all(isinstance(text, str) for text in texts[:2]) and isinstance(texts[2], str | None)):
            raise ValueError("what it says of the folder is no text")
        if texts[0] not in (OWN, *exporters()):
            raise ValueError("its format is not known")
        return SavedCard(_within(card), str(texts[0]), str(texts[1]), texts[2], weights)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, SourceError) as error:
        why = "" if isinstance(error, KeyError | SourceError) else f" ({str(error)[:60]})"
        raise SourceError(
            f"{file} is not a card that lowbit wrote{why}; remove it and measure the model again"
        ) from None


def portable(card: Card) -> Card:
    """The card without paths of this machine, which a folder that is passed on should not have."""
    text = card.text and replace(card.text, name=without_path(card.text.name))
    return replace(card, parts=replace(card.parts, model=without_path(card.parts.model)), text=text)


def without_path(name: str) -> str:
    """The name of a file or folder without where it lies; other names, such as `org/model`, as they are."""
    path = Path(name)
    try:
        local = path.is_absolute() or name.startswith((".", "~")) or path.exists()
    except (OSError, ValueError):  # a long recipe is no path
        return name
    return path.resolve().name if local else name


def digest_of(text: str) -> str:
    """SHA-256 of a text, "" for an empty one."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def _number(text: str) -> int:
    if len(text) > 30:
        raise ValueError("a number is too large")
    return int(text)


def _clean(value: Any, depth: int) -> Any:
    """JSON whose texts move no cursor, with numbers that can be shown."""
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    if isinstance(value, dict):
        return {_plain(key): _clean(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_clean(item, depth + 1) for item in value]
    if isinstance(value, str):
        return _plain(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) <= _MOST_NUMBER:
        raise ValueError("a number is too large")
    return value


def _plain(text: str) -> str:
    """Without control characters other than line ends and tabs, and without those that turn the direction of text."""
    return "".join(
        c if c in "\n\t" or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _TURNS) else "\ufffd"
        for c in text
    )


def _within(card: Card) -> Card:
    """ValueError where a count or size is impossible."""
    parts, coverage = card.parts, card.parts.coverage
    sizes = [parts.parameters, parts.bytes_before, parts.bytes_after, parts.weight_bytes]
    if any(size is not None and size <= 0 for size in sizes) or (coverage is not None and coverage.total < 0):
        raise ValueError("a size is not above 0")
    if parts.linear_bits is not None and not (math.isfinite(parts.linear_bits) and 0 <= parts.linear_bits <= 64):
        raise ValueError("bits per weight are impossible")
    if card.quality is not None and card.quality.kind not in MEANING:
        raise ValueError("its way of scoring is not known")
    return card
