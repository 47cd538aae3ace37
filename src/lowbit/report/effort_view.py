"""What a run will do about calibration text, and how long it will take, in the lines that are printed before the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.calibration.package_text import BUILTIN, NAME
from lowbit.kv import CacheFormat
from lowbit.recipes.cache_rules import AutoCache
from lowbit.report.progress_view import duration_text
from lowbit.report.wording import bytes_text

if TYPE_CHECKING:
    from lowbit.pipeline.effort import Decision
    from lowbit.recipes.recipe import Recipe


def decision_lines(decision: Decision) -> list[str]:
    """Whole sentences: what is done, how long it takes, and how to choose otherwise."""
    lines = [f"note: {decision.reason}"] if decision.reason else []
    windows = "1 window" if decision.samples == 1 else f"{decision.samples} windows"
    takes = "" if decision.seconds is None else f"Takes about {duration_text(decision.seconds)} here"
    if decision.calibration == BUILTIN:
        lines.append(
            f"{takes + ', c' if takes else 'C'}alibrated on {windows} of {NAME}; --calibration FILE takes your own text, --data-free none."
        )
    elif takes:
        lines.append(f"{takes}.")
    if decision.longer is not None:
        rung, seconds = decision.longer
        lines.append(f"With --effort {rung.name} it would lose less, and take about {duration_text(seconds)}.")
    return lines


def cache_line(recipe: Recipe) -> str | None:
    """What is done about the cache after the weights; None where a recipe leaves nothing of it open."""
    cache = recipe.cache
    if isinstance(cache, AutoCache):
        return (
            f"After that the KV cache is checked on text, for the fewest bits that lose at most {cache.kl:g} nats a token, which takes minutes more "
            "and memory for the whole model; a format such as kv=int8 needs no check."
        )
    if isinstance(cache, CacheFormat) and cache.calibrated:
        return "After that the tables of the KV cache are found on text, which takes a while more and memory for the whole model."
    return None


def peak_line(peak: int, with_card: bool) -> str:
    """What the whole command takes of the memory."""
    return f"Needs about {bytes_text(peak)} of memory at its peak{', the card included' if with_card else ''}."
