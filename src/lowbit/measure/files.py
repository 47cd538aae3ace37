"""A model in files, and the float model that it is held against, before either is opened: whether they are measured whole or block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import LowbitError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.interchange.hf.loading import load_config, load_tokenizer
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.source import Source
from lowbit.measure.card import CardParts
from lowbit.measure.card_file import fingerprints
from lowbit.measure.environment import environment
from lowbit.measure.size import disk_size
from lowbit.measure.streamed import Streamed
from lowbit.measure.subject import folder_of, folder_parts, parts_of
from lowbit.pipeline.api import Quantized
from lowbit.planning.measuring import block_by_block


@dataclass(frozen=True, eq=False)
class Files:
    """What is measured, by its name.

    name    a folder that lowbit wrote, or any name of a float model
    ours    whether it is the former
    source  of the float model by that name, None for a folder of lowbit
    base    the float model that it is held against, if any
    """

    name: str | Path
    ours: bool
    source: Source | None
    base: Source | None
    given: Any
    tokenizer: Any

    @staticmethod
    def of(model: Any, against: Any, tokenizer: Any) -> Files | None:
        """None where one of the two is in memory."""
        folder = folder_of(model)
        if (
            isinstance(model, nn.Module)
            or isinstance(against, nn.Module)
            or (isinstance(model, Quantized) and folder is None)
        ):
            return None
        base = model.source if isinstance(model, Quantized) else None
        if against is not None:
            base = open_source(against)
        if isinstance(base, ModuleSource):
            return None
        if folder is not None:
            return Files(folder, True, None, base, model, tokenizer)
        source = open_source(model, tokenizer=tokenizer)
        return None if isinstance(source, ModuleSource) else Files(model, False, source, base, model, tokenizer)

    @property
    def config(self) -> Any:
        """Of the model, None where it has none."""
        return load_config(Path(self.name)) if self.source is None else self.source.config

    @cached_property
    def stored_bytes(self) -> int:
        """Of the model's weights, a float model's in float32."""
        return disk_size(self.name).weights if self.source is None else 4 * count_of(self.source)

    def streams(self, length: int) -> bool:
        """Whether they are measured block by block on windows of `length` tokens: by the rule of sizes, where the model predicts tokens."""
        try:
            config = self.config
            if config is None or any(each is not None and each.config is None for each in (self.source, self.base)):
                return False
            count = 0 if self.base is None else count_of(self.base)
            return block_by_block(count, self.stored_bytes, config, length) and predicts_tokens(meta_model(config))
        except LowbitError:
            return False  # said by what opens it

    @cached_property
    def model(self) -> Streamed:
        """The model, block by block."""
        return Streamed.of(LowbitFolder(self.name) if self.source is None else self.source)

    @cached_property
    def against(self) -> Streamed | None:
        """The float model, block by block."""
        return None if self.base is None else Streamed.of(self.base)

    def parts(self) -> CardParts:
        """What the card says of the model before it runs."""
        if self.source is not None:
            parts = CardParts(
                self.source.label, self.source.storage, count_of(self.source), weight_bytes=self.source.disk_bytes()
            )
        else:
            parts = (
                parts_of(self.given, self.tokenizer)[0]
                if isinstance(self.given, Quantized)
                else folder_parts(Path(self.name))
            )
        if parts.bytes_before is None and self.base is not None:
            parts = replace(parts, bytes_before=sum(spec.nbytes for spec in self.base.tensors.values()))
        return parts

    def words(self) -> Any:
        """The tokenizer."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.source is not None:
            return self.source.tokenizer()
        if isinstance(self.given, Quantized):
            return self.given.source.tokenizer()
        return load_tokenizer(Path(self.name), str(self.name))

    def about(self) -> Mapping[str, Any]:
        """Everything of the models and of this machine's programs that decides figures, ready for JSON."""
        here = environment()
        mine = dict(fingerprints(Path(self.name))) if self.source is None else self.source.identity()
        return {
            "model": mine, "base": None if self.base is None else self.base.identity(),
            "lowbit": here.lowbit, "torch": here.torch, "transformers": here.transformers,
        }  # fmt: skip


def count_of(source: Source) -> int:
    """Numbers in the parameters of a float model."""
    extra = set(source.extra)
    known = source.inventory.params
    return sum(
        math.prod(spec.shape)
        for name, spec in source.tensors.items()
        if name not in extra and spec.dtype.is_floating_point and known[name].keep != "buffer"
    )
