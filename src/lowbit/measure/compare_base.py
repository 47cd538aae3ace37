"""The float model of a comparison and the models that are made of it: whole in memory, or block by block from their files."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.source import Source
from lowbit.measure.as_generated import as_generated
from lowbit.measure.backends import Backend
from lowbit.measure.card import CardParts
from lowbit.measure.files import Files, count_of
from lowbit.measure.float_model import baseline_of
from lowbit.measure.interleave import STANDARD, SpeedSettings
from lowbit.measure.own_program import memory_now, open_runs, why_no_base, why_no_runs
from lowbit.measure.size import count_parameters, module_bytes
from lowbit.measure.streamed import Streamed
from lowbit.measure.subject import type_of
from lowbit.pipeline.api import Quantized
from lowbit.pipeline.loading import load
from lowbit.planning.measuring import block_by_block


class Compared(Protocol):
    """How models of one comparison are run.

    module      the float model, or the same without memory, to be asked what it is
    type        in which it computes
    parts       what its row says of it
    """

    module: nn.Module
    type: torch.dtype
    parts: CardParts

    @property
    def base(self) -> nn.Module | Streamed:
        """The float model, to be measured."""
        ...

    def opened(self, made: Quantized) -> nn.Module | Streamed:
        """What was made of it, to be measured."""
        ...

    def backend(self, made: Quantized, opened: nn.Module | Streamed) -> Backend:
        """What measures its speed. SourceError where it is not opened whole."""
        ...

    def baseline(self, threads: int | None) -> Backend:
        """What measures the speed of the float model. SourceError where it is not opened whole."""
        ...


def compared(
    model: Any, source: Source, length: int, tokenizer: Callable[[], Any], speed: SpeedSettings | None
) -> Compared:
    """By the rule of sizes, with as many bits for the models that are made as w8 has."""
    if not isinstance(source, ModuleSource) and source.config is not None:
        count = count_of(source)
        if block_by_block(count, count, source.config, length) and predicts_tokens(meta_model(source.config)):
            return _BlockByBlock(source, tokenizer, speed)
    return _Whole(model, source, tokenizer, speed)


def _parts(source: Source, run: torch.dtype, count: int, nbytes: int) -> CardParts:
    return CardParts(
        source.label, str(run).removeprefix("torch."), count, bytes_before=sum(s.nbytes for s in source.tensors.values()),
        weight_bytes=nbytes, linear_bits=8.0 * run.itemsize,
    )  # fmt: skip


class _Whole:
    def __init__(self, model: Any, source: Source, tokenizer: Callable[[], Any], speed: SpeedSettings | None) -> None:
        self._in_memory = isinstance(model, nn.Module)
        self._source, self._tokenizer = source, tokenizer
        self.type = type_of(model, None) if self._in_memory else torch.float32
        self.module = source.load_float(self.type)
        self.parts = _parts(source, self.type, count_parameters(self.module), module_bytes(self.module))
        self._typed = functools.cache(self._in_type)
        self.baseline = functools.cache(
            lambda threads: baseline_of(self.module, self._typed, speed or STANDARD, threads)
        )

    def _in_type(
        self, dtype: torch.dtype
    ) -> nn.Module:  # the base stays what the quality of the next row is held against
        return self.module if dtype == self.type else self._source.load_float(dtype)

    @property
    def base(self) -> nn.Module:
        return self.module

    def opened(self, made: Quantized) -> nn.Module:
        return made.model if made.folder is None or self._in_memory else load(made.folder, dtype=torch.float32)

    def backend(self, made: Quantized, opened: Any) -> Backend:
        by_name = made.folder is not None and opened.can_generate()
        return as_generated(made.folder if by_name else opened, opened, self._tokenizer())


class _BlockByBlock:
    def __init__(self, source: Source, tokenizer: Callable[[], Any], speed: SpeedSettings | None) -> None:
        self._source, self._tokenizer, self._speed = source, tokenizer, speed
        self.type = torch.float32
        self.base = Streamed.of(source)
        self.module = self.base.module
        count = count_of(source)
        self.parts = _parts(source, self.type, count, 4 * count)
        self._floats = functools.cache(lambda: source.load_float(torch.float32))

    def opened(self, made: Quantized) -> Streamed:
        return Streamed.of(LowbitFolder(_folder(made)))

    def backend(self, made: Quantized, opened: Any) -> Backend:
        files = Files(_folder(made), True, None, self._source, made, self._tokenizer())
        room, whose = memory_now()
        why = why_no_runs(files, room, whose) or why_no_base(files, room, whose)
        if why is not None:
            raise SourceError(why)
        return open_runs(files).backend()

    def baseline(self, threads: int | None) -> Backend:
        return baseline_of(self._floats(), lambda dtype: self._floats().to(dtype), self._speed or STANDARD, threads)


def _folder(made: Quantized) -> Path:
    if made.folder is None:
        raise SourceError("what was made has no folder, so it cannot be measured block by block")
    return made.folder
