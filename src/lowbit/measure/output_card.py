"""The card of a model that predicts no tokens: embeddings, classes, sound, images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lowbit.calibration.text import load_text
from lowbit.errors import SourceError, TextError
from lowbit.measure.card import Card, CardParts, TextMark
from lowbit.measure.environment import environment
from lowbit.measure.outputs import measure_outputs, takes_text
from lowbit.measure.windows import Windows, make_windows

_FEW = 8  # windows of text, where no number is asked for


def card_of_outputs(
    subject: nn.Module, base: nn.Module | None, parts: CardParts, tokenizer: Callable[[], Any], text: Any,
    windows: int | None, length: int, say: Callable[[str], None],
) -> Card:  # fmt: skip
    """How far the outputs of `subject` are from those of `base`, or why that is not measured.

    tokenizer: gives it; one that cannot be had leaves random tokens. SourceError where there is no float model, TextError for
    a text that is not usable, or would be ignored.
    """
    if base is None:
        raise SourceError(
            f"a {type(subject).__name__} predicts no tokens, so it has no perplexity; name its float model (--against, "
            "against=...) to compare what the two give"
        )
    cut: Windows | None = None
    if takes_text(subject):
        try:
            words = tokenizer()
        except SourceError:
            words = None
        if words is not None:
            cut = make_windows(load_text(text), words, length=length, limit=windows or _FEW, model=subject)
    if text is not None and cut is None:
        raise TextError(
            f"a text was given, but this {type(subject).__name__} reads none, or has no tokenizer; leave it out"
        )
    say("comparing outputs with those of the float model")
    try:
        found = measure_outputs(subject, base, cut)
    except SourceError as error:
        return Card(parts, environment=environment(), unmeasured=str(error))
    return Card(parts, None if cut is None else TextMark.of(cut), environment=environment(), outputs=found)
