"""The card that a folder carries: README.md for people and the hub, `card.json` for `lowbit card`, written and read again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.calibration.text import load_text
from lowbit.errors import LowbitError, OutputError, SourceError
from lowbit.interchange.companions import MODULES
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.files.finished import MANIFEST
from lowbit.interchange.hf.loading import load_config
from lowbit.interchange.model_card import (
    BASE_README,
    README,
    BaseFacts,
    facts_of_folder,
    is_marked,
    is_unchanged,
    sealed,
    text_of,
)  # fmt: skip
from lowbit.interchange.opening import open_source
from lowbit.kv.folder import read_cache_format
from lowbit.measure.card import Card, CardParts
from lowbit.measure.card_file import OWN, SavedCard, digest_of, fingerprints, load, portable, save, write_text
from lowbit.measure.size import disk_size
from lowbit.planning.cache_words import facts_of_folder as facts_of_folder_cache
from lowbit.report.readme import readme


@dataclass(frozen=True)
class Made:
    """What a folder was made from and by. facts: of the model before it. target: whose format it is. base, command: as `SavedCard`."""

    facts: BaseFacts
    target: str = OWN
    base: str | None = None
    command: str = ""


def card(folder: str | Path) -> Card:
    """The card that a folder carries, without measuring. SourceError where it has none.

    >>> notes = lowbit.save_card(lowbit.evaluate(quantized, model, text, windows=1, length=64), quantized)
    >>> lowbit.card(quantized).text.windows
    1
    """
    return read(folder).card


def save_card(card: Card, folder: str | Path, against: str | None = None) -> tuple[str, ...]:
    """Keep a `card` of `evaluate` in the folder that was measured, as README.md and `card.json`.

    against: the float model by any of its names, whose licence and name go into the README; None: what the folder knows of it.
    Returns what a person should know, such as that a README.md of their own stays. OutputError, SourceError.

    >>> found = lowbit.evaluate(quantized, model, text, windows=1, length=64)
    >>> lowbit.save_card(found, quantized)
    ()
    """
    facts = facts_of_folder(Path(folder)) if against is None else open_source(against).facts()
    base = facts.base_model if against is None or Path(against).exists() else against
    return keep(card, folder, Made(facts, base=base))


def read(folder: str | Path) -> SavedCard:
    """The same with what is known of the folder. SourceError that names the command that makes a card."""
    place = Path(folder)
    if place.is_file():
        raise SourceError(
            f"{folder} is one file, which carries no card; `lowbit evaluate {folder} --against FLOAT_MODEL` measures it"
        )
    if not place.is_dir():
        raise SourceError(f"there is no folder {str(folder)!r}; name one that lowbit wrote")
    found = load(place)
    if found is None:
        raise SourceError(_no_card(place, str(folder)))
    return found


def _no_card(place: Path, named: str) -> str:
    """What to do for a card: make a folder of lowbit, or measure the one at hand."""
    if not (place / MANIFEST).is_file():
        return (
            f"{named} is no folder that lowbit wrote, so it has no card; `lowbit quantize {named}` makes one that has"
        )
    base = facts_of_folder(place).base_model or "FLOAT_MODEL"
    return f"{named} has no card yet; `lowbit evaluate {named} --against {base}` measures one and keeps it there"


def outdated(saved: SavedCard, folder: str | Path) -> str | None:
    """What to say where the weights are not those that were measured, None where they are."""
    try:
        changed = saved.changed(Path(folder))
    except LowbitError as error:
        return f"the card may be out of date: {error}"
    if not changed:
        return None
    again = f"lowbit evaluate {folder} --against {saved.base or 'FLOAT_MODEL'}"
    return f"this card is out of date: {', '.join(changed[:3])} changed after it was measured; `{again}` measures again"


def keep(card: Card, folder: str | Path, made: Made) -> tuple[str, ...]:
    """Write README.md, and `card.json` where something was measured, into a finished folder. Returns what a person should know.

    A README.md that somebody else wrote, or changed, stays as it is. That of the base model, which came with it, is kept as
    README.base.md. Without figures a card that is there and of these weights stays. OutputError.
    """
    place, card = Path(folder), portable(card)
    measured = card.quality is not None or card.outputs is not None
    before = _fresh(place)
    if not measured and before is not None:
        return ()
    card = _with_earlier(card, before)
    if measured:
        save(place, SavedCard(card, made.target, made.command, made.base, fingerprints(place)))
    return keep_readme(card, place, made)


def keep_readme(card: Card, folder: Path, made: Made, *, rewrite: bool = False) -> tuple[str, ...]:
    """README.md alone, as `keep`. rewrite: also where it is somebody else's, or was changed."""
    note = _make_room(folder, made.facts, rewrite)
    if note:
        return (note,)
    base = made.facts.base_model or facts_of_folder(folder).base_model
    readme_is_there = made.facts.readme if (folder / BASE_README).exists() else ""
    facts = replace(made.facts, base_model=base, readme=readme_is_there)
    write_text(folder / README, sealed(_text(card, folder, replace(made, facts=facts))))
    return ()


def keep_cache(folder: str | Path) -> tuple[str, ...]:
    """After the cache format of a folder has changed: its card and README.md say the new one. Returns what a person should know."""
    place = Path(folder)
    saved = load(place)
    if saved is None:
        return ()
    card = _with_cache(saved.card, place)
    save(place, replace(saved, card=card))
    facts = facts_of_folder(place)
    if note := _make_room(place, replace(facts, readme=""), False):  # whatever is there now came with no base model
        return (note,)
    return keep_readme(card, place, Made(facts, saved.target, saved.base, saved.command))


def _with_cache(card: Card, folder: Path) -> Card:
    """The card with the cache format that the folder carries now."""
    found = facts_of_folder_cache(load_config(folder), read_cache_format(folder))
    return replace(card, parts=replace(card.parts, cache=found))


def text(saved: SavedCard, folder: Path) -> str:
    """What README.md of a folder would say."""
    return _text(saved.card, folder, Made(facts_of_folder(folder), saved.target, saved.base, saved.command))


def _text(card: Card, folder: Path, made: Made) -> str:
    name, kind = folder.resolve().name, _architecture(folder)
    embeds = made.target == OWN and (folder / MODULES).is_file()
    return readme(name, card, made.facts, architecture=kind, target=made.target, command=made.command, embeds=embeds)


def keep_of_export(folder: Path, out: Path, target: str, error: float, unequal: Sequence[str]) -> tuple[str, ...]:
    """The card of an export that is a folder: that of the folder of lowbit that it was written from, which has the same weights."""
    saved = _fresh(folder)
    facts = facts_of_folder(folder)
    if saved is None:
        return keep(Card(_parts_of_manifest(folder)), out, Made(facts, target))
    return keep(of_export(saved.card, out, error, unequal), out, Made(facts, target, saved.base, saved.command))


def measured_before(
    folder: str | Path, text: Any, windows: int | None, length: int, *, quick: bool = False
) -> Card | None:
    """The card in a folder where it is of these weights beside the float model, on `windows` windows of `length` tokens of this text,
    a source as of `load_text`; None otherwise, and for conversations, whose text depends on the model.

    quick: whether a card that was made in limited time will do; windows may then be None, for as many as there was time for. Where it
    is not set such a card never does.
    """
    saved = _fresh(Path(folder))
    if saved is None or (seen := saved.card.text) is None or (saved.card.budget is not None and not quick):
        return None
    compared = saved.card.outputs is not None or (
        saved.card.quality is not None and saved.card.quality.kl_mean is not None
    )
    open_ = windows is None and (saved.card.budget is not None or saved.card.outputs is not None)
    asked = [] if open_ else [(seen.length, length)]
    asked += [(seen.windows, windows)] if windows is not None else []
    # A text or a model that is shorter than what was asked for says so in a note.
    same = all(
        had == wanted or any(note.endswith(f"instead of {wanted}") for note in seen.notes) for had, wanted in asked
    )
    return saved.card if compared and same and seen.sha256 == load_text(text).sha256 else None


def of_export(card: Card, out: Path, error: float, unequal: Sequence[str]) -> Card:
    """The card of an export: its own sizes, the quality of the weights, and no speed, which is that of the program that runs it."""
    equal = "are equal to these" if not unequal else f"are within {error:.1e} of these, relative to their size"
    note = f"quality was measured on lowbit's own folder, whose weights {equal}; the speed is that of the program that runs it"
    size = disk_size(out)
    parts = replace(card.parts, bytes_after=size.total, weight_bytes=size.weights, notes=(*card.parts.notes, note))
    return replace(card, parts=parts, speed=None, run_peak=None)


def _fresh(folder: Path) -> SavedCard | None:
    """The card in a folder where it is of the weights that are there now."""
    try:
        found = load(folder)
        return found if found is not None and not found.changed(folder) else None
    except LowbitError:
        return None


def _with_earlier(card: Card, before: SavedCard | None) -> Card:
    """What was measured of these weights earlier and not now: of quantizing, and on the same machine the speed."""
    if before is None:
        return card
    old, parts = before.card, card.parts
    parts = replace(
        parts,
        coverage=old.parts.coverage or parts.coverage,
        bytes_before=parts.bytes_before or old.parts.bytes_before,
        quantize_seconds=parts.quantize_seconds or old.parts.quantize_seconds,
        quantize_peak=parts.quantize_peak or old.parts.quantize_peak,
    )
    card = replace(card, parts=parts, sample=card.sample or old.sample)
    if card.speed is None and old.environment == card.environment:
        card = replace(card, speed=old.speed, run_peak=old.run_peak)
    return card


def _make_room(folder: Path, facts: BaseFacts, rewrite: bool) -> str:
    """Set the base model's README aside; what to say where README.md is somebody's own and stays."""
    own = folder / README
    text = text_of(own)
    if not own.exists() or is_unchanged(text):
        return ""
    from_base = text != "" and digest_of(text) == facts.readme and not (folder / BASE_README).exists()
    if not from_base and not rewrite:
        changed = "was changed by hand" if is_marked(text) else "is not lowbit's"
        return f"{own} {changed} and stays as it is; `lowbit card {folder} --rewrite` writes it anew"
    if not is_marked(text) and not (folder / BASE_README).exists():
        try:
            replace_file(own, folder / BASE_README)
        except OSError as error:
            raise OutputError(f"cannot write {folder / BASE_README}: {error.strerror or error}") from error
    return ""


def _architecture(folder: Path) -> str:
    names = _json(folder / "config.json").get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _parts_of_manifest(folder: Path) -> CardParts:
    """What lowbit.json says of a folder, without loading its model."""
    manifest = _json(folder / MANIFEST)
    recipe = manifest.get("recipe")
    recipe = recipe if isinstance(recipe, dict) else {}
    text, name, bits = recipe.get("text"), recipe.get("name"), manifest.get("linear_bits_per_weight")
    title = f"{name} = {text}" if name else str(text or "unknown")
    size = disk_size(folder)
    return CardParts(
        folder.resolve().name, title, bytes_after=size.total, weight_bytes=size.weights,
        linear_bits=float(bits) if isinstance(bits, (int, float)) else None,
    )  # fmt: skip


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
