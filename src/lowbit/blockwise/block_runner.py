"""Runs one block of a model that is cut where its blocks repeat, so that one block at a time has its weights in memory.

No model list. A chain is a `ModuleList` of blocks that the model calls. To run block i alone, the model's own forward is called:
finished blocks give back what was saved of them (of the last one, where only that is read), block i runs, and the forward is left
right after it. So masks, positions, cross attention and whatever else a block is handed come from the model's own code. Which
blocks there are, in which order, and what each reads, is asked of that code too (`text_path.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowbit.blockwise.places import BlockPlace, TextPath
from lowbit.errors import SourceError


class LeaveForward(BaseException):
    """Leaves a forward from inside; carries what was wanted of it. Not an Exception, so that no model catches it."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


class Saved:
    """What a block returned, its tensors apart from its structure."""

    def __init__(self, value: Any) -> None:
        leaves, self.spec = tree_flatten(value)
        self.tensors = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def value(self, tensors: dict[str, Tensor]) -> Any:
        """The same structure around `tensors`."""
        leaves = [tensors.get(str(i), other) for i, other in enumerate(self.others)]
        return tree_unflatten(leaves, self.spec)


@contextmanager
def forwards_replaced(replaced: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Modules compute something else while this lasts."""
    before = {module: module.__dict__.get("forward") for module in replaced}
    try:
        for module, function in replaced.items():
            module.forward = function  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own  # type: ignore[method-assign]


class BlockRunner:
    """Runs one block of a model whose other blocks have no weights. `path`: the way of text through it."""

    def __init__(self, model: nn.Module, path: TextPath) -> None:
        self.path, self.reader = path, model.get_submodule(path.reader)
        self._modules = {place: model.get_submodule(place.name) for place in path.places}

    def run(
        self, place: BlockPlace | None, inputs: dict[str, Tensor], before: Mapping[BlockPlace, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """What the block returns for `inputs` of the reader. `before`: what stands for the finished blocks.

        Of a model whose blocks put values into containers that they are handed, it is (what the block returns, what these hold then).
        `place` None: what the reader returns with all blocks finished. `tensors` stand in the places of parameters of these
        names. SourceError when the model never calls the block.
        """
        replaced: dict[nn.Module, Callable[..., Any]] = {
            self._modules[other]: self._giving(found) for other, found in before.items() if other != place
        }
        if place is not None and place.chain:
            replaced[self._modules[place]] = self._leaving(self._modules[place].forward)
        own = self.path.reader + "." if self.path.reader else ""
        given = {name.removeprefix(own): tensor for name, tensor in (tensors or {}).items()}
        try:
            with forwards_replaced(replaced):
                found = functional_call(self.reader, given, (), inputs) if given else self.reader(**inputs)
            if place is None or not place.chain:
                return found
        except LeaveForward as left:
            return left.value
        raise SourceError(f"{type(self.reader).__name__} does not call {place.name} when it reads text")

    def _leaving(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            if not self.path.handed:
                raise LeaveForward(found)
            raise LeaveForward((found, [_contents(value) for value in self._handed(args, kwargs)]))

        return run

    def _giving(self, found: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.path.handed:
                return found
            returned, contents = found
            for container, held in zip(self._handed(args, kwargs), contents):
                _fill(container, held)
            return returned

        return run

    def _handed(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
        return [value for key, value in [*enumerate(args), *kwargs.items()] if key in self.path.handed]


def _contents(container: Any) -> Any:
    return dict(container) if isinstance(container, MutableMapping) else list(container)


def _fill(container: Any, held: Any) -> None:
    if isinstance(container, MutableMapping):
        container.update(held)
    else:
        container[:] = held


def model_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward over token ids [batch, length]; an encoder-decoder reads them on both sides."""
    inputs = {"input_ids": ids}
    config = getattr(model, "config", None)
    if config is None:
        raise SourceError(f"{type(model).__name__} has no transformers config, so it is not known how it takes text")
    takes = inspect.signature(model.forward).parameters
    if getattr(model, "main_input_name", "input_ids") != "input_ids" or "input_ids" not in takes:
        raise SourceError(
            f"the model is quantized only without text: {type(model).__name__} reads {getattr(model, 'main_input_name', 'other things')}, "
            "not text"
        )
    if "decoder_input_ids" in takes and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    return inputs
