"""The speed and memory of a model as `lowbit generate` runs it, beside the float model in its faster types."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import LowbitError
from lowbit.measure.as_generated import as_generated
from lowbit.measure.backends import Backend
from lowbit.measure.float_model import in_faster_types
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.quality import Progress
from lowbit.measure.speed import Speed, measure_speed
from lowbit.measure.token_times import torch_threads

_log = logging.getLogger("lowbit")

# Of running a model: lowbit's own, the system's, and those that PyTorch raises, out of memory among them.
FAILURES = (LowbitError, OSError, MemoryError, RuntimeError)


def speed_as_generated(
    model: str | Path | nn.Module, subject: nn.Module, base: nn.Module | None, cast: bool, tokenizer: Any,
    settings: SpeedSettings, say: Callable[[str], None], progress: Progress | None,
) -> tuple[Speed, int | None]:  # fmt: skip
    """The speed of `model` as `lowbit generate` runs it, and the peak resident bytes of a fresh process up to its first token.

    cast: the base may be cast, and is then measured in its faster types. What fails is said, and what was measured before stands.
    """
    try:
        say("measuring speed")
        program = as_generated(model, subject, tokenizer)
        other: nn.Module | Backend | None = base
        if base is not None and cast:
            with torch_threads(program.threads):
                other = in_faster_types(base.to, settings)
        found = measure_speed(program, base=other, settings=settings, progress=progress)
    except FAILURES as error:
        return Speed(skipped=str(error) or type(error).__name__), None
    if program.first is None or found.model is None:
        return found, None
    return found, peak_of(program, say)


def peak_of(program: Backend, say: Callable[[str], None]) -> int | None:
    """The peak resident bytes of a fresh process up to the first token of `program`; None where that fails, which is said."""
    assert program.first is not None
    try:
        say("measuring memory in a fresh process")
        return program.first().peak
    except LowbitError as error:
        _log.warning("memory while running is not measured: %s", error)
        return None
