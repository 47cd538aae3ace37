"""Quantizers on the modules of a model: parameters keep their names and places, and a forward sees them rounded.

A hook before the forward of a module puts the rounded weight where its parameter is, and one after it puts the parameter
back. The module around it does the same, as some read the weights of their children past them (Mamba). So optimizers, checkpoints,
ties and everything that lists parameters see the float model, and the quantizers are children of the modules whose weights they round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.opening import open_source
from lowbit.interchange.tensors import TensorPlan
from lowbit.nn.swap import owner_of
from lowbit.recipes.recipe import Recipe
from lowbit.training.input_quantizer import TrainedInputs
from lowbit.training.weight_quantizer import WeightQuantizer

_KEPT = "_float_parameters"  # where a module has its parameters while a forward sees them rounded


@dataclass(frozen=True)
class Words:
    """Where the tokenizer is that `convert` writes: itself, or folders and names that may have it, read when it is asked for."""

    given: Any = None
    places: tuple[str, ...] = ()

    def tokenizer(self) -> Any:
        """The tokenizer, or None where there is none."""
        for place in self.places if self.given is None else ():
            try:
                return open_source(place).tokenizer()
            except SourceError:
                continue
        return self.given


@dataclass(frozen=True, eq=False)
class Attached:
    """What `prepare_qat` leaves on a model: the recipe, how it learns, and what it planned of each quantized tensor."""

    recipe: Recipe
    how: str
    plans: dict[str, TensorPlan] = field(default_factory=dict)
    words: Words = Words()

    def __deepcopy__(self, memo: Any) -> Attached:
        return self


class Swap:
    """The hooks of one module: `weights` by the name of the parameter, `inputs` of a linear layer, `children` whose weights are
    rounded as long as its forward runs."""

    def __init__(self) -> None:
        self.weights: dict[str, WeightQuantizer] = {}
        self.inputs: TrainedInputs | None = None
        self.children: list[nn.Module] = []

    @torch.compiler.disable
    def before(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with rounded inputs; the module and its children have rounded weights from now on."""
        if self.weights and args:
            args = (self._rounded(args[0]), *args[1:])
        elif self.weights and kwargs:
            first = next(iter(kwargs))
            kwargs = {**kwargs, first: self._rounded(kwargs[first])}
        for each in (module, *self.children):
            _enter(each)
        return args, kwargs

    def _rounded(self, x: Any) -> Any:
        if self.inputs is not None:
            x = self.inputs(x)
        # Packed weights multiply rows under rows; of other inputs PyTorch adds products in another order.
        return x.contiguous() if isinstance(x, Tensor) else x

    @torch.compiler.disable
    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """The parameters are back, also where the forward failed."""
        for each in (module, *self.children):
            _leave(each)


def _enter(module: nn.Module) -> None:
    depth, kept = module.__dict__.get(_KEPT, (0, {}))
    found = swap_of(module)
    if depth == 0 and found is not None:
        for leaf, quantizer in found.weights.items():
            kept[leaf] = module._parameters[leaf]
            module._parameters[leaf] = quantizer(kept[leaf])
    module.__dict__[_KEPT] = depth + 1, kept


def _leave(module: nn.Module) -> None:
    depth, kept = module.__dict__.get(_KEPT, (0, {}))
    if depth > 1:
        module.__dict__[_KEPT] = depth - 1, kept
        return
    module.__dict__.pop(_KEPT, None)
    module._parameters.update(kept)


def swap_of(module: nn.Module) -> Swap | None:
    """The hooks of a module that has some."""
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Swap):
            return owner
    return None


def _swap(module: nn.Module) -> Swap:
    found = swap_of(module)
    if found is None:
        found = Swap()
        module.register_forward_pre_hook(found.before, with_kwargs=True)
        module.register_forward_hook(found.after, always_call=True)
    return found


QUANTIZER = "_quantizer."
INPUTS = "input_quantizer"


def child_name(leaf: str) -> str:
    """The quantizer of the parameter `leaf` as a child of its module."""
    return f"{leaf}{QUANTIZER[:-1]}"


def attach(
    model: nn.Module, name: str, aliases: list[str], quantizer: WeightQuantizer, inputs: TrainedInputs | None
) -> None:
    """Let the parameter `name`, and under its other names, be seen as `quantizer` makes it."""
    owner, leaf = owner_of(model, name)
    owner.add_module(child_name(leaf), quantizer)
    if inputs is not None:
        owner.add_module(INPUTS, inputs)
    for place in (name, *aliases):
        module, last = owner_of(model, place)
        _swap(module).weights[last] = quantizer  # of another module it is no child: it is saved once
        path = place.rpartition(".")[0]
        around = _swap(model.get_submodule(path.rpartition(".")[0])).children if path else []
        if all(module is not child for child in around):
            around.append(module)
    _swap(owner).inputs = inputs


def prepared(model: nn.Module) -> tuple[nn.Module, Attached] | None:
    """The model that `prepare_qat` gave, which may be inside another module, and what it left there."""
    for module in model.modules():
        found = module.__dict__.get(MARK)
        if isinstance(found, Attached):
            return module, found
    return None


MARK = "_lowbit_training"


def require_prepared(model: nn.Module) -> tuple[nn.Module, Attached]:
    """`prepared`, or RecipeError."""
    found = prepared(model)
    if found is None:
        raise RecipeError(
            f"{type(model).__name__} is not a model that lowbit.prepare_qat gave; prepare it and train it first"
        )
    return found


def quantizers(model: nn.Module) -> Iterator[tuple[str, WeightQuantizer, TrainedInputs | None]]:
    """(name of the parameter, its quantizer, that of its inputs), each once."""
    for path, module in model.named_modules():
        found = swap_of(module)
        for leaf, quantizer in found.weights.items() if found is not None else ():
            if module._modules.get(child_name(leaf)) is quantizer:
                yield (f"{path}.{leaf}" if path else leaf), quantizer, found.inputs  # type: ignore[union-attr]


def stripped(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without quantizers. Parameters that have one share memory, all others are copied."""
    shared: dict[int, Any] = {}
    ours: set[int] = set()
    for module in model.modules():
        found = swap_of(module)
        if found is None:
            continue
        for leaf in found.weights:
            parameter = module._parameters[leaf]
            assert parameter is not None
            shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        for quantizer in (*found.weights.values(), found.inputs):
            if quantizer is not None:
                shared[id(quantizer)] = nn.Identity()  # taken out below
                ours |= {id(p) for p in quantizer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in ours:
            shared.setdefault(id(parameter), nn.Parameter(parameter.detach().clone(), requires_grad=False))
    made = copy.deepcopy(model, shared)
    for module in made.modules():
        found = swap_of(module)
        if found is None:
            continue
        for name in [child_name(leaf) for leaf in found.weights] + [INPUTS]:
            module._modules.pop(name, None)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), Swap)]:
                del hooks[key]
                for side in (
                    "_forward_pre_hooks_with_kwargs",
                    "_forward_hooks_with_kwargs",
                    "_forward_hooks_always_called",
                ):
                    getattr(module, side).pop(key, None)
    made.__dict__.pop(MARK, None)
    return made.eval()


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The parameter `name`, float."""
    owner, leaf = owner_of(model, name)
    found = owner._parameters[leaf]
    assert found is not None
    return found
