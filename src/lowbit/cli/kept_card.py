"""What the commands leave in the folders that they write or measure: README.md and card.json. A failure here is said, and costs nothing else."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowbit.cli.job import Outcome
    from lowbit.convert.exporting import Exported
    from lowbit.interchange.model_card import BaseFacts
    from lowbit.measure.card import Card
    from lowbit.pipeline.api import Quantized


def words_of(
    model: str, recipe: str, target_format: str | None, effort: str, calibration: str | None, samples: int | None, chat: bool,
    target: Mapping[str, Any], text: str | None, windows: int | None, card: str | None, adapter: str | None = None,
) -> list[str]:  # fmt: skip
    """`lowbit quantize` with these options, to be read by others: files by their names alone."""
    options: dict[str, Any] = {
        "adapter": adapter, "as": target_format, "effort": None if effort == "auto" else effort, "calibration": calibration, "samples": samples, "chat": chat, **target, "text": text,
        "windows": windows, "card": card,
    }  # fmt: skip
    return ["lowbit", "quantize", _named(model), _named(recipe), *_options(options)]


def merge_words(
    base: str, adapter: str, recipe: str | None, dtype: str | None, effort: str, calibration: str | None, samples: int | None, chat: bool,
    out: str,
) -> str:  # fmt: skip
    """`lowbit merge` with these options, to be read by others."""
    options = {
        "out": out,
        "dtype": dtype, "effort": None if effort == "auto" else effort, "calibration": calibration, "samples": samples, "chat": chat,
    }  # fmt: skip
    named = [_named(each) for each in (base, adapter, recipe) if each is not None]
    return " ".join(["lowbit", "merge", *named, *_options(options)])


def keep_card(made: Outcome, out: Path, keep: Path | None, model: str, command: str, card: Card | None) -> list[str]:
    """After `quantize`: into lowbit's folder, and into the export where it is a folder. What a person should know."""
    from lowbit.measure.card import Card
    from lowbit.measure.subject import plan_parts
    from lowbit.report import card as cards

    plain = card or Card(plan_parts(made.quantized.plan))
    facts = made.quantized.source.facts()
    base = _base(model, facts)
    said: list[str] = []
    if made.exported is None or keep is not None:
        place = keep or out
        said += _kept(lambda: cards.keep(plain, place, cards.Made(facts, base=base, command=command)))
    done = made.exported
    if done is not None and done.path.is_dir():
        target = cards.Made(facts, done.target, base, command)
        said += _kept(
            lambda: cards.keep(cards.of_export(plain, done.path, done.weights, done.unequal), done.path, target)
        )
    return said


def keep_imported(made: Quantized, out: Path, model: str) -> list[str]:
    """After `import`, which measures nothing: the README alone."""
    from lowbit.measure.card import Card
    from lowbit.measure.subject import plan_parts
    from lowbit.report import card as cards

    facts = made.source.facts()
    of = cards.Made(facts, base=_base(model, facts), command=f"lowbit import {_named(model)}")
    return _kept(lambda: cards.keep(Card(plan_parts(made.plan)), out, of))


def keep_evaluated(
    card: Card, model: str, against: str, text: str | None, windows: int | None, length: int | None, speed: bool,
    inputs: str | None = None, adapter: str | None = None,
) -> list[str]:  # fmt: skip
    """After `evaluate` of a folder that lowbit wrote."""
    from lowbit.errors import LowbitError
    from lowbit.interchange.files.settings import is_ours
    from lowbit.interchange.model_card import facts_of_folder
    from lowbit.interchange.opening import open_source
    from lowbit.report import card as cards

    if not is_ours(model):
        return []
    options = {
        "against": _named(against),
        "adapter": adapter,
        "text": text,
        "windows": windows,
        "length": length,
        "inputs": inputs,
        "speed": speed,
    }
    command = " ".join(["lowbit", "evaluate", _named(model), *_options(options)])
    try:
        facts = open_source(against).facts()
    except LowbitError:
        facts = facts_of_folder(Path(model))
    made = cards.Made(facts, base=_base(against, facts), command=command)
    return _kept(lambda: cards.keep(card, model, made))


def described(folder: Path, made: Exported) -> None:
    """After `export`: the README of an export that is a folder."""
    from lowbit.cli import console
    from lowbit.report import card as cards

    if made.path.is_dir():
        for line in _kept(lambda: cards.keep_of_export(folder, made.path, made.target, made.weights, made.unequal)):
            console.dim(line)


def _base(model: str, facts: BaseFacts) -> str:
    """The float model as others can type it: a name as it is, a folder by its name on the hub where that is known."""
    return (facts.base_model or _named(model)) if Path(model).exists() else model


def _kept(write: Callable[[], tuple[str, ...]]) -> list[str]:
    from lowbit.errors import LowbitError

    try:
        return list(write())
    except (LowbitError, OSError) as error:
        return [f"the card is not kept in the folder: {error}"]


def _options(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value is not None and value is not False:
            words += [f"--{name.replace('_', '-')}", _named(str(value))]
    return words


def _named(name: str) -> str:
    from lowbit.measure.card_file import without_path

    return shlex.quote(without_path(name))
