"""Where a model comes from, as one interface: which reader gives it is decided in `opening.py`.

A Source knows every tensor by the name that the model of transformers 5 gives it, and
reads one tensor at a time.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.errors import SourceError, nearest
from lowbit.interchange.end_tokens import end_tokens
from lowbit.interchange.model_card import BaseFacts
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from lowbit.interchange.inventory import Inventory
    from lowbit.interchange.readers.left_out import LeftOut
    from lowbit.interchange.readers.quantized_tensor import QuantizedTensor

_log = logging.getLogger(__name__)


class Source(ABC):
    """A model that can be asked for its tensors one by one.

    label      what the user typed, or the class name of a module
    config     the transformers config, or None for a module without one
    tensors    every tensor by its model name, in a fixed order; a tied alias is not listed
    inventory  what each tensor is; has a Param for every name in `tensors`
    extra      the names in `tensors` that the model does not know, kept as they are
    dropped    checkpoint names that the model leaves unread on purpose, such as old mask buffers
    left_out   the same in short: how many of a kind, how large, and why
    remarks    what a user should know of how the source was read, such as which of two sets of weights; without paths
    storage    how the source stores its weights: "float", or what a quantized one says of itself
    merged     what else is in the weights that it gives, such as an adapter, a sentence each; without paths
    places     folders that it reads besides, which no output may replace
    """

    label: str
    config: PretrainedConfig | None
    tensors: Mapping[str, TensorSpec]
    inventory: Inventory
    extra: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    remarks: tuple[str, ...] = ()
    storage: str = "float"
    merged: tuple[str, ...] = ()
    places: tuple[Path, ...] = ()

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, and no byte of another. SourceError for an unknown name or a damaged file."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """A cheap fingerprint: JSON-able, the same for the same model, another for another."""

    def stored_as(self, name: str) -> QuantizedTensor | None:
        """The tensor as a quantized source stores it; None where it is float. Reads no codes yet."""
        self.spec(name)
        return None

    def float_type(self, name: str) -> torch.dtype:
        """The type in which a float tensor is stored; `read` may give a wider one."""
        return self.spec(name).dtype

    def disk_bytes(self) -> int:
        """Bytes that the weights take where they are stored; less than `tensors` where the source is quantized itself."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @abstractmethod
    def save_assets(self, out: Path) -> None:
        """Write what goes with the weights, such as the tokenizer, into the folder `out`; no weights, no config.json."""

    def left_files(self) -> tuple[str, ...]:
        """What of the source's files `save_assets` does not write, a line for each reason, in names without paths."""
        return ()

    def facts(self) -> BaseFacts:
        """What the published model says of itself: its name on the hub, licence, languages; nothing where nobody says it."""
        return BaseFacts()

    @abstractmethod
    def tokenizer(self) -> Any:
        """The model's tokenizer. SourceError when it has none."""

    def generation(self) -> dict[str, Any]:
        """What the model says of generating text, as in generation_config.json; empty where it says nothing."""
        return {}

    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text; none where neither the model nor its tokenizer names one."""
        try:
            words = self.tokenizer()
        except SourceError:
            words = None
        return end_tokens(self.generation(), self.config, words)

    def load_float(self, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> nn.Module:
        """The float model in evaluation mode, every tensor read once and cast to `dtype`."""
        if self.config is None:
            raise SourceError(f"{self.label} has no transformers config to build a model from; pass the module itself")
        from lowbit.interchange.hf.models import float_model

        known = {name: spec for name, spec in self.tensors.items() if name not in set(self.extra)}
        model = float_model(self.config, known, self.read, dtype, self.label)
        named = self.generation().get("eos_token_id")
        if named is not None and getattr(model, "generation_config", None) is not None:
            # Built from the config alone, it knows of no other end than the one there.
            model.generation_config.eos_token_id = named  # type: ignore[union-attr]
        return model.to(device).eval()

    def spec(self, name: str) -> TensorSpec:
        """The spec of `name`. SourceError when there is no such tensor."""
        if name not in self.tensors:
            raise SourceError(f"{self.label} has no tensor {name!r}{nearest(name, self.tensors)}")
        return self.tensors[name]


def say_remarks(label: str, remarks: Iterable[str]) -> None:
    """Warn of what a user should know of a source that was opened; the command line shows each once."""
    for remark in remarks:
        _log.warning("%s: %s", label, remark)
