"""The program that answers with a model which is measured block by block: opened after its quality, alone, where it fits into memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from lowbit.engine.fallback import answering_type
from lowbit.engine.generator import choose
from lowbit.errors import SourceError
from lowbit.interchange.hf.loading import load_config
from lowbit.measure.backends import Backend
from lowbit.measure.environment import free_memory
from lowbit.measure.files import Files, count_of
from lowbit.measure.float_model import in_faster_types
from lowbit.measure.interleave import SpeedSettings
from lowbit.measure.quality import Progress
from lowbit.measure.runs import Runs, by_engine, by_transformers
from lowbit.measure.speed import Speed, measure_speed
from lowbit.measure.speed_as_generated import FAILURES, peak_of
from lowbit.measure.token_times import torch_threads
from lowbit.pipeline.loading import load

_SPARE = 1_000_000_000  # bytes that are left to other programs where all free memory may be used


def open_runs(files: Files) -> Runs:
    """The model in the engine, else in transformers in the type that `lowbit generate` loads it in. SourceError where it generates no text."""
    if not files.model.module.can_generate():  # type: ignore[operator]
        raise SourceError(f"a {type(files.model.module).__name__} does not generate text")
    engine, reason = choose(files.name if files.source is None else files.source, {}, files.words())
    if engine is not None:
        return by_engine(engine, files.name)
    if files.source is not None:
        return by_transformers(files.source.load_float(torch.float32), reason)
    return by_transformers(load(files.name, dtype=answering_type(load_config(Path(files.name)))), reason)


def why_no_runs(files: Files, room: int, whose: str) -> str | None:
    """Why the model is not opened whole: it takes more than `room`, which `whose` says the origin of; None where it fits."""
    need = files.stored_bytes
    return (
        None
        if need <= room
        else f"the model takes {_gb(need)} in memory, and {whose}; `lowbit bench` measures its speed"
    )


def why_no_base(files: Files, room: int, whose: str) -> str | None:
    """The same of the float model, which is to stand beside it."""
    assert files.base is not None
    need = files.stored_bytes + 4 * count_of(files.base)
    return None if need <= room else f"the float model, for both take {_gb(need)} in memory, and {whose}"


def memory_now() -> tuple[int, str]:
    """(bytes that measuring may take where speed was asked for, that in words)."""
    room = max(0, free_memory() - _SPARE)
    return room, f"{_gb(room)} are free here"


def speed_of(
    files: Files,
    runs: Runs,
    settings: SpeedSettings,
    alone: str | None,
    say: Callable[[str], None],
    progress: Progress | None,
) -> tuple[Speed, int | None]:
    """The speed of the model, beside the float model in its faster types unless `alone` says why not, and the peak of a fresh process."""
    try:
        say("measuring speed")
        program = runs.backend()
        other: Backend | None = None
        if files.base is not None and alone is None:
            base = files.base.load_float(torch.float32)
            with torch_threads(program.threads):
                other = in_faster_types(base.to, settings)
        found = measure_speed(program, base=other, settings=settings, progress=progress)
    except FAILURES as error:
        return Speed(skipped=str(error) or type(error).__name__), None
    return found, None if program.first is None or found.model is None else peak_of(program, say)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
