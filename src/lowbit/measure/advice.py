"""What would help a model whose quality is not good: other commands for the same model, with what they would bring.

How much calibration text brings is said as a figure only for the recipes of which that was measured (benchmarks/results/
calibrated.md and presets.md); 4-bit recipes lose about a quarter with it of what they lose without. For others it is said without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lowbit.errors import LowbitError
from lowbit.measure.card import Card
from lowbit.measure.verdict import THRESHOLDS, verdict_of
from lowbit.recipes.recipe import Recipe

_GOOD = tuple(row.word for row in THRESHOLDS[:2])
_QUARTER = ("w4", "nl4")  # recipes whose loss with and without text was measured on the same model and text
_MORE_BITS, _EIGHT_BITS = 5.5, 8.1  # in the linear layers; the second is w8
_OWN = "lowbit"


@dataclass(frozen=True)
class Advice:
    """Why, in a sentence, and the words of the command."""

    why: str
    command: tuple[str, ...]


def advice(card: Card, base: str | None, target: str = _OWN) -> tuple[Advice, ...]:
    """What to do about a card's quality; nothing where it is good, or not measured.

    base: the float model as it can be typed. target: whose format was written, as `--as` has it.
    """
    found = verdict_of(card)
    parts = card.parts
    if found is None or found.word in _GOOD or base is None:
        return ()
    try:
        name = parts.recipe.partition(" = ")[0]
        recipe = Recipe.parse(name)
    except LowbitError:  # the recipe of another program, or one that was imported
        return ()
    out = []
    if card.quality is not None and parts.calibrated is False and recipe.calibrated().uses_calibration:
        how_much = (
            "calibrating on text leaves about a quarter of this loss, at the same size (measured on SmolLM2-135M)"
            if recipe.name in _QUARTER
            else "calibration text usually lowers this loss, at the same size"
        )
        why = f"{how_much}; `builtin` is the text that comes with lowbit, and a file of your own text may be better"
        out.append(_command(why, base, name, ("--calibration", "builtin"), target, "calibrated"))
    bits = parts.linear_bits
    if card.quality is not None and bits is not None and bits < _MORE_BITS - 0.4 and target == _OWN:
        why = f"{_MORE_BITS} bits per weight in the linear layers instead of {bits:.2f}, spent where they help most"
        out.append(_command(why, base, "w4", ("--target-bits", f"{_MORE_BITS}"), target, f"{_MORE_BITS}-bits"))
    if name != "w8" and bits is not None:
        more = _EIGHT_BITS / bits
        size = f", {more:.1f} times as large in the linear layers" if more > 1.15 else ", at about the same size"
        out.append(_command(f"8 bits, hard to tell from the float model{size}", base, "w8", (), target, ""))
    return tuple(out)


def _command(why: str, base: str, recipe: str, more: tuple[str, ...], target: str, ending: str) -> Advice:
    """`lowbit quantize` of the same model under a name of its own."""
    words = ["lowbit", "quantize", base, recipe, *more]
    if target != _OWN:
        words += ["--as", target]
    if ending and target != "gguf":
        words += ["-o", f"{Path(base).name}-{Path(recipe).name if '@' not in recipe else 'quantized'}-{ending}"]
    elif ending:
        words += ["-o", f"{Path(base).name}-{ending}.gguf"]
    return Advice(why, tuple(words))
