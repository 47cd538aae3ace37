"""The card of a model that predicts no tokens: embeddings, classes, sound, images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.calibration.text import load_text
from lowbit.calibration.windows import Frame
from lowbit.errors import SourceError, TextError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.pooling import Pooling, pooling_of
from lowbit.interchange.source import Source
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.environment import environment
from lowbit.measure.given_inputs import given_inputs
from lowbit.measure.inputs import takes
from lowbit.measure.outputs import measure_outputs, takes_text
from lowbit.measure.quality import Progress
from lowbit.measure.subject import open_subject
from lowbit.measure.windows import Tokens, Windows
from lowbit.pipeline.api import Quantized

LENGTH = 128  # tokens of a text, where no number is asked for: a paragraph, as is searched and labelled
_TEXTS, _BESIDE_MEDIA = 64, 16  # texts, where no number is asked for: alone, or one for each image


def makes_embeddings(folders: tuple[Path, ...]) -> bool:
    """Whether files of the model, in one of `folders_of`, say how it makes embeddings."""
    return any(pooling_of(folder) is not None for folder in folders)


def compares_outputs(source: Source) -> bool:
    """Whether the card of a model has its outputs, and not the tokens that it predicts: known without loading it."""
    from lowbit.interchange.hf.models import model_class

    if source.config is None:
        return False
    return not predicts_tokens(model_class(source.config)) or makes_embeddings(folders_of(None, source))


def refuse_outputs(model: nn.Module) -> None:
    """SourceError for a model that predicts no tokens, where nothing else is compared."""
    if not predicts_tokens(model):
        raise SourceError(
            f"a {type(model).__name__} predicts no tokens, and these are what is compared here; quantize it by each recipe, and see the card of "
            "each, or `lowbit evaluate FOLDER --against MODEL`"
        )


def refuse_inputs(inputs: Any, model: Any) -> None:
    """TextError for inputs where the model predicts tokens of text, or embeds it."""
    if inputs is not None:
        name = type(model).__name__ if isinstance(model, nn.Module) else "model that"
        raise TextError(f"a {name} reads text, so that inputs would be ignored; give a text (--text, text=...) instead")


def card_of_embeddings(
    model: str | Path | nn.Module | Quantized, source: Source | None, tokenizer: Any, text: Any, windows: int | None,
    length: int | None, say: Callable[[str], None], inputs: Any, folders: tuple[Path, ...], progress: Progress | None = None,
    seconds: float | None = None,
) -> Card | None:  # fmt: skip
    """The card of a model whose files say how it makes embeddings, however it is built; None for any other.

    A language model that was made into one is loaded with its head and predicts tokens, which nobody asks of it.
    """
    if not makes_embeddings(folders):
        return None
    subject = open_subject(model, tokenizer, torch.float32)
    parts = subject.parts
    if parts.bytes_before is None and source is not None:
        parts = replace(parts, bytes_before=sum(spec.nbytes for spec in source.tensors.values()))
    base = None if source is None else source.load_float(torch.float32)
    words = subject.tokenizer or (None if source is None else source.tokenizer)
    return card_of_outputs(
        subject.module, base, parts, words or _no_tokenizer, text, windows, length, say, inputs=inputs, folders=folders,
        progress=progress, seconds=seconds,
    )  # fmt: skip


def card_of_outputs(
    subject: nn.Module, base: nn.Module | None, parts: CardParts, tokenizer: Callable[[], Any], text: Any,
    windows: int | None, length: int | None, say: Callable[[str], None], *, inputs: Any = None, folders: tuple[Path, ...] = (),
    progress: Progress | None = None, seconds: float | None = None,
) -> Card:  # fmt: skip
    """How far the outputs of `subject` are from those of `base`, or why that is not measured.

    tokenizer: gives it; one that cannot be had leaves random tokens. inputs: those of the user, as `given_inputs` takes them.
    folders: of the model's own files, the first that has one counts. seconds: as of `measure_outputs`, where no number of windows is
    asked for. SourceError where there is no float model, TextError for
    a text or inputs that are not usable, or would be ignored.
    """
    pooling = next((way for folder in folders if (way := pooling_of(folder)) is not None), None)
    if base is None:
        what = "makes embeddings" if pooling is not None and predicts_tokens(subject) else "predicts no tokens"
        raise SourceError(
            f"a {type(subject).__name__} {what}, so it has no perplexity; name its float model (--against, "
            "against=...) to compare what the two give"
        )
    given = None if inputs is None else given_inputs(inputs)
    if given is not None and takes_text(subject) and _reads_nothing_else(subject) and given.ready is None:
        raise TextError(
            f"a {type(subject).__name__} reads text alone, which --text (text=...) gives; leave the inputs out"
        )
    words = None
    with suppress(SourceError):
        words = tokenizer()
    cut: Windows | None = None
    if takes_text(subject) and words is not None and (given is None or given.ready is None):
        cut = _windows(load_text(text), words, subject, pooling, windows, length)
    if text is not None and cut is None:
        raise TextError(
            f"a text was given, but this {type(subject).__name__} reads none, or has no tokenizer; leave it out"
        )
    say("comparing outputs with those of the float model")
    try:
        found = measure_outputs(
            subject,
            base,
            cut,
            given=given,
            pooling=pooling,
            tokenizer=words,
            folder=_processors(folders),
            progress=progress,
            seconds=None if windows is not None else seconds,
        )
    except SourceError as error:
        return Card(parts, environment=environment(), unmeasured=str(error))
    return _limited(
        Card(parts, None if cut is None else TextMark.of(cut), environment=environment(), outputs=found), seconds
    )


def _limited(card: Card, seconds: float | None) -> Card:
    """The card with what it says of inputs that there was no time for."""
    found = card.outputs
    if found is None or found.count is None or found.of in (None, found.count) or seconds is None:
        return card
    note = f"measured in limited time, {seconds:.0f} s: {found.count} of {found.of} inputs; `lowbit evaluate` measures all of them"
    return replace(
        card, parts=replace(card.parts, notes=(*card.parts.notes, note)), budget=seconds,
        text=card.text and replace(card.text, windows=min(found.count, card.text.windows)),
    )  # fmt: skip


def _windows(
    text: Any, tokenizer: Any, model: nn.Module, pooling: Pooling | None, windows: int | None, length: int | None
) -> Windows:
    """Texts of one length, each begun and ended as the tokenizer does, since these models read a text as a whole."""
    tokens = Tokens.of(text, tokenizer, model)
    longest = min(
        (n for n in (tokens.longest, None if pooling is None else pooling.longest) if n is not None), default=None
    )
    tokens = replace(tokens, frame=Frame.of(tokenizer, model, whole=pooling is not None), longest=longest)
    usual = _TEXTS if _reads_nothing_else(model) else _BESIDE_MEDIA
    size = min(LENGTH, longest or LENGTH) if length is None else length
    there = len(tokens.ids) // max(1, size - tokens.frame.size)
    return tokens.windows(size, (min(usual, there) or None) if windows is None else windows)


def _reads_nothing_else(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "input_ids" and not any(
        takes(model, name) for name in ("pixel_values", "input_features", "input_values")
    )


def folders_of(model: Any, source: Source | None) -> tuple[Path, ...]:
    """Where files of a model's own may lie: the folder that is measured, then that of the float model."""
    own = model.folder if isinstance(model, Quantized) else model
    places = (own, getattr(source, "folder", None))
    return tuple(Path(place) for place in places if isinstance(place, (str, Path)) and Path(place).is_dir())


def _processors(folders: tuple[Path, ...]) -> Path | None:
    names = ("preprocessor_config.json", "processor_config.json")
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def _no_tokenizer() -> Any:
    raise SourceError("no tokenizer comes with this model; pass tokenizer=...")
