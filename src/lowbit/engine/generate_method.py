"""`generate` of a model that `lowbit.load` gave: text goes to the engine, tensors to transformers."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.engine.engine import Engine
from lowbit.engine.fallback import Transformers
from lowbit.engine.generator import choose
from lowbit.engine.tokenizer import tokenizer_of

_log = logging.getLogger("lowbit")


class GenerateMethod:
    """Stands in the place of the bound method `model.generate`.

    `model.generate("text", ...)` or with a list of texts is `Engine.generate`, with the same options, on an engine that
    is made of the model's weights at the first such call and kept; `forget()` after the weights were changed. Any other
    call is transformers' own. An attribute of the model, not a class, so that its class, names and files stay as they are;
    copies and pickles make an engine of their own.
    """

    def __init__(self, model: nn.Module, folder: str) -> None:
        functools.update_wrapper(self, type(model).generate)  # type: ignore[attr-defined]  # what asks for its signature
        self._model, self._folder = model, folder
        self._generator: Engine | Transformers | None = None
        self._modules = 0

    def __call__(self, *args: Any, **options: Any) -> Any:
        if args and _is_text(args[0]):
            return self.generator().generate(*args, **options)
        return type(self._model).generate(self._model, *args, **options)  # type: ignore[attr-defined]

    def generator(self) -> Engine | Transformers:
        """What answers text: the engine, or transformers for a model that the engine does not compute, which is logged."""
        modules = sum(1 for _ in self._model.modules())
        if (
            modules != self._modules
        ):  # such as those of an adapter that was put on it, which an engine of before knows nothing of
            self._generator, self._modules = None, modules
        if self._generator is None:
            tokenizer = tokenizer_of(Path(self._folder))
            engine, reason = choose(self._model, {}, tokenizer)
            self._generator = engine or Transformers(self._model, tokenizer, reason, self._folder)
            if engine is None:
                _log.warning("%s", self._generator)
        return self._generator

    def forget(self) -> None:
        """Give the engine's memory back; the next call with text makes a new one."""
        self._generator = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_model": self._model, "_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**{key[1:]: value for key, value in state.items()})  # type: ignore[misc]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)
    )
