"""Runs one block of a model that is cut where its blocks repeat, so that one block at a time has its weights in memory.

No model list. A chain is a `ModuleList` of blocks that the model calls one after another. To run block i alone, the
model's own forward is called: finished blocks give back what was saved of the last of them, block i runs, and the
forward is left right after it. So masks, positions, cross attention and whatever else a block is handed come from
the model's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from lowbit.errors import SourceError


class LeaveForward(BaseException):
    """Leaves a forward from inside; carries what was wanted of it. Not an Exception, so that no model catches it."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.value = value


@dataclass(frozen=True)
class BlockPlace:
    """Block `index` of the chain `chain` (the name of its ModuleList), with the name of the block itself.

    Where nothing repeats, the whole model is the one block, with an empty name.
    """

    chain: str
    index: int
    name: str

    def owns(self, tensor: str) -> bool:
        """Whether a tensor lies in this block."""
        return not self.name or tensor.startswith(self.name + ".")


def blocks_of(model: nn.Module) -> list[BlockPlace]:
    """The blocks of every outermost ModuleList that holds matrices, in order; else the model as one."""
    found: list[BlockPlace] = []
    taken: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(t + ".") for t in taken):
            continue
        if len(module) and all(any(p.dim() >= 2 for p in block.parameters()) for block in module):
            taken.append(name)
            found += [BlockPlace(name, i, f"{name}.{i}") for i in range(len(module))]
    return found or [BlockPlace("", 0, "")]


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
    """Runs one block of a model whose other blocks have no weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places = blocks_of(model)
        self._modules = {place: model.get_submodule(place.name) for place in self.places}

    def run(
        self, place: BlockPlace | None, inputs: dict[str, Tensor], before: Mapping[str, Any],
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Any:  # fmt: skip
        """What the block returns for `inputs` of the model. `before`: by chain, what its last finished block returned.

        `place` None: what the model returns with all blocks finished. `tensors` stand in the places of parameters of these
        names. SourceError when the model never calls the block.
        """
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        if place is not None and place.chain:
            original = self._modules[place].forward
            replaced[self._modules[place]] = lambda *a, **k: _leave(original(*a, **k))
        for other, module in self._modules.items():
            behind = place is None or other.chain != place.chain or other.index < place.index
            if other.chain in before and behind:
                replaced[module] = lambda *a, _given=before[other.chain], **k: _given
        try:
            with forwards_replaced(replaced):
                found = functional_call(self.model, dict(tensors), (), inputs) if tensors else self.model(**inputs)
            if place is None or not place.chain:
                return found
        except LeaveForward as left:
            return left.value
        raise SourceError(f"{type(self.model).__name__} does not call {place.name} when it reads text")


def _leave(value: Any) -> Any:
    raise LeaveForward(value)


def model_inputs(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The arguments of a forward over token ids [batch, length]; an encoder-decoder reads them on both sides."""
    inputs = {"input_ids": ids}
    config = getattr(model, "config", None)
    if config is None:
        raise SourceError(f"{type(model).__name__} has no transformers config, so it is not known how it takes text")
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise SourceError(
            f"{type(model).__name__} reads {model.main_input_name}, not text; calibrate it on its own data"
        )
    return inputs
