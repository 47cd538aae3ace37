"""What a reader should know of figures that were measured in limited time."""

from __future__ import annotations

from lowbit.measure.card_budget import is_clear
from lowbit.measure.quality import Quality
from lowbit.measure.verdict import near_limit
from lowbit.measure.windows import Tokens


def time_notes(quality: Quality, there: int, tokens: Tokens, length: int, seconds: float) -> list[str]:
    """A sentence each. there: windows of the text."""
    notes = []
    if quality.windows < there:
        notes.append(
            f"measured in limited time, {seconds:.0f} s: {quality.windows} of the {there} windows that the text has; `lowbit evaluate` "
            "measures all of them, and `lowbit quantize --card full` every figure without a limit"
        )
    if quality.length < length and quality.length != tokens.longest:
        notes.append(
            f"windows of {quality.length} tokens instead of {length}, for the same reason; with less text before them tokens are harder "
            "to predict, so the perplexity is higher"
        )
    kl = quality.kl_mean
    if kl is not None and not is_clear(quality):
        near = near_limit(kl.value, kl.stderr)
        which = "" if near is None else f": the verdict could also be {near.word!r}"
        notes.append(f"the standard error is wide for so few windows{which}; more windows would tell (--windows N)")
    return notes
