"""A model as a card made in limited time runs it: one program, opened once, for its quality, its answer and its speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.engine.engine import Engine
from lowbit.engine.generator import choose
from lowbit.errors import SourceError
from lowbit.interchange.hf.running import max_positions
from lowbit.interchange.source import Source
from lowbit.measure.backends import Backend, in_transformers, module_times, of_engine, times_of_engine
from lowbit.measure.interleave import Times
from lowbit.measure.sample import answer, answered
from lowbit.measure.scoring import EngineScorer, Scorer, WindowScorer


@dataclass(frozen=True, eq=False)
class Runs:
    """A model in one program.

    program   that, in words, with the type that it computes in
    scorer    gives the logits of windows
    longest   the most tokens that it takes, None where there is no limit
    answer    (tokenizer, prompt, new tokens at most) -> its greedy answer; None where it generates no text
    times     how long greedy generation takes; None as well
    backend   gives what measures its speed; SourceError where it generates no text
    module    the model in transformers, where that runs it
    """

    program: str
    scorer: WindowScorer
    longest: int | None
    answer: Callable[[Any, str, int], str] | None
    times: Times | None
    backend: Callable[[], Backend]
    module: nn.Module | None = None


def by_engine(engine: Engine, folder: str | Path | None = None) -> Runs:
    """A decoder in the engine. folder: from which a fresh process opens it."""
    positions = engine.shape.positions
    again = None if folder is None else {"model": str(folder)}

    def said(_: Any, prompt: str, new: int) -> str:
        return answered(engine, positions, prompt, new)

    return Runs(
        str(engine), EngineScorer(engine), positions, said, times_of_engine(engine),
        lambda: of_engine(engine, str(engine), again),
    )  # fmt: skip


def by_transformers(module: nn.Module, reason: str = "") -> Runs:
    """A model in transformers, in the type that it has. reason: why it is not the engine that runs it."""
    own = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    writes = getattr(module, "can_generate", bool)()
    return Runs(
        f"transformers, {str(own).removeprefix('torch.')}", Scorer.of(module), max_positions(module),
        (lambda tokenizer, prompt, new: answer(module, tokenizer, prompt, new=new)) if writes else None,
        module_times(module) if writes else None, lambda: in_transformers(module, note=reason), module,
    )  # fmt: skip


def both_by_engine(folder: str | Path, base: Source | None) -> tuple[Runs, Runs | None] | str:
    """The model in `folder` and the one that it was made from, both in the engine; why not, where it does not compute one of them."""
    mine, reason = choose(folder, {})
    if mine is None:
        return reason
    if base is None:
        return by_engine(mine, folder), None
    try:
        other, reason = choose(base, {})
    except SourceError as error:
        return str(error)
    return reason if other is None else (by_engine(mine, folder), by_engine(other))
