"""The way of text through a model: which of its modules reads it, which blocks it calls and in which order, and what each needs of the others.

Asked of the model's own code by one forward over a few tokens, in which every weight is zero and takes no memory and no product is
computed, so that it takes the time of its Python lines. What an operation gives is marked with the blocks whose outputs it was made of: so
it is seen, for any architecture, whether a block reads only the block before it, which weights text never comes to (the vision tower of a
model that reads images too), and that a model cannot be run over text at all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, treespec_dumps

from lowbit.blockwise.block_runner import forwards_replaced, model_inputs
from lowbit.blockwise.capture import PRODUCTS
from lowbit.blockwise.places import BlockPlace, TextPath, blocks_of
from lowbit.errors import SourceError
from lowbit.interchange.hf.text_config import text_config

TOKENS = 16  # that are read; some models pool or chunk a few of them
_NOTHING: frozenset[int] = frozenset()
_TABLE = -1  # stands for an embedding among the numbers of blocks
_SKIPPED = {*PRODUCTS, F.embedding, torch.einsum}


def text_path(model: nn.Module, ids: Tensor) -> TextPath:
    """The way of token ids [1, length] through a model on the meta device (buffers may have values). SourceError where it reads no text."""
    problem: Exception | None = None
    for name, reader in _readers(model):
        try:
            return _followed(model, name, model_inputs(reader, ids))
        except SourceError as error:
            problem = problem or error
        except Exception as error:  # somebody else's model
            said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            problem = problem or SourceError(
                f"the model is quantized only without text: {type(reader).__name__} cannot be run over text here ({said})"
            )
    assert problem is not None  # the model itself is the first that is tried
    raise problem


def made_up_ids(config: Any, tokens: int = TOKENS) -> Tensor:
    """Random token ids of a model, int64 [1, tokens]."""
    size = getattr(text_config(config), "vocab_size", None)
    size = size if isinstance(size, int) and size > 0 else 2
    return torch.randint(0, size, (1, tokens), generator=torch.Generator().manual_seed(0))


def _readers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model, and the models inside it that have a config of their own kind: the outermost first, of these the largest."""
    yield "", model
    models = [(n, m) for n, m in model.named_modules() if n and hasattr(m, "main_input_name") and hasattr(m, "config")]
    inside = [(n, m) for n, m in models if type(m.config) is not type(model.config)]
    yield from sorted(inside, key=lambda found: (found[0].count("."), -sum(p.numel() for p in found[1].parameters())))


def _followed(model: nn.Module, name: str, inputs: Mapping[str, Tensor]) -> TextPath:
    tried = copy.deepcopy(model)  # some models change themselves by what they read
    reader = tried.get_submodule(name)
    _without_memory(tried)
    own = [place for place in blocks_of(tried) if place.chain and (not name or place.chain.startswith(name + "."))]
    trace = _Trace({place: tried.get_submodule(place.name) for place in own})
    with torch.no_grad(), forwards_replaced(trace.forwards()), trace:
        found = reader(**inputs)
    trace.reads.append(_read_by(found))
    if trace.tangled or not trace.called:
        return TextPath(name, (BlockPlace("", 0, name),), (_NOTHING, _NOTHING), used=frozenset(trace.used))
    looking_up = frozenset(j for j, read in enumerate(trace.reads) if _TABLE in read)
    return TextPath(
        name, tuple(trace.called), _needed(trace), frozenset(trace.handed), frozenset(trace.putting), frozenset(trace.used), looking_up,
        frozenset(trace.directly),
    )  # fmt: skip


def _without_memory(model: nn.Module) -> None:
    """Every parameter and buffer that has no values gets zeros that share one number, and knows its name."""
    for path, module in model.named_modules():
        for leaf, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is None:
                continue
            if tensor.is_meta:
                zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
                setattr(module, leaf, nn.Parameter(zeros, False) if isinstance(tensor, nn.Parameter) else zeros)
            getattr(module, leaf).lowbit_name = f"{path}.{leaf}" if path else leaf


def _needed(trace: _Trace) -> tuple[frozenset[int], ...]:
    """Which outputs are still to be read, by the number of the next block; all of a chain where these differ in shape."""
    chains: dict[str, set[Any]] = {}
    for i, place in enumerate(trace.called):
        chains.setdefault(place.chain, set()).add(trace.shapes[i])
    kept = {i for i, place in enumerate(trace.called) if len(chains[place.chain]) > 1}
    steps = range(len(trace.reads))
    return tuple(
        frozenset(k for k in range(i) if k in kept or any(k in trace.reads[j] for j in steps[i:])) for i in steps
    )


def _read_by(value: Any) -> frozenset[int]:
    return frozenset().union(*(_source(t) for t in _tensors(value)))


def _tensors(value: Any) -> list[Tensor]:
    """All in a structure of tuples, lists, mappings and outputs of transformers."""
    if isinstance(value, Mapping):
        value = list(value.values())
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += _tensors(leaf)
    return found


def _source(t: Tensor) -> frozenset[int]:
    return getattr(t, "lowbit_from", _NOTHING)


@dataclass(eq=False)
class _Trace(TorchFunctionMode):
    """Follows one forward. reads: by block, numbers of the blocks whose outputs it reads. tangled: blocks cannot be run one by one,
    as one is called again, or reads of another what neither a return value nor a container holds."""

    modules: dict[BlockPlace, nn.Module]
    called: list[BlockPlace] = field(default_factory=list)
    reads: list[frozenset[int]] = field(default_factory=list)
    shapes: list[Any] = field(default_factory=list)
    handed: set[int | str] = field(default_factory=set)
    putting: set[int] = field(default_factory=set)
    used: set[str] = field(default_factory=set)
    directly: set[str] = field(default_factory=set)
    tangled: bool = False
    inside: int | None = None

    def __post_init__(self) -> None:
        super().__init__()

    def forwards(self) -> dict[nn.Module, Callable[..., Any]]:
        """What takes the place of the forwards of blocks."""
        return {m: self._watched(place, m.forward) for place, m in self.modules.items()}

    def _watched(self, place: BlockPlace, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.inside is not None or place in self.called:
                self.tangled = True
                return forward(*args, **kwargs)
            number = self.inside = len(self.called)
            self.called.append(place)
            self.reads.append(_NOTHING)
            self.shapes.append(None)
            found = forward(*args, **kwargs)
            self.inside = None
            self.tangled = self.tangled or not _can_be_kept(found)
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            containers = [(key, value) for key, value in given if is_container(value)]
            for key, value in containers:
                if any(getattr(t, "lowbit_in", None) == number for t in _tensors(value)):
                    self.handed.add(key)
                    self.putting.add(number)
            given_on = _tensors([found, *(value for _, value in containers)])
            self.reads[number] |= _read_by(given_on)
            for t in given_on:
                t.lowbit_from, t.lowbit_in = frozenset({number}), None
            self.shapes[number] = tuple((t.shape, t.dtype) for t in _tensors(found))
            return found

        return run

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        operands = _tensors([args, list(kwargs.values())])
        before = [t._version for t in operands]
        if func in _SKIPPED and any(_has_no_values(t) for t in operands):
            found = _zeros_for(func, args, kwargs)
        elif operands and _has_no_values(operands[0]) and _writes(func):
            found = operands[0]  # a weight that the model scales in its place stays zero
        else:
            found = func(*args, **kwargs)
        self.used.update(name for t in operands if (name := getattr(t, "lowbit_name", None)))
        changed = [t for t, version in zip(operands, before) if t._version != version]
        results = _tensors(found) if isinstance(found, (Tensor, tuple, list)) else []
        made = [t for t in results if not any(t is operand for operand in operands)] + changed
        made_of = frozenset().union(*map(_source, operands))
        if func is F.embedding:
            made_of |= {_TABLE}
        elif made:
            self.directly.update(name for t in operands if (name := getattr(t, "lowbit_name", None)))
        if made:
            places = {where for t in operands if (where := getattr(t, "lowbit_in", None)) is not None}
            self.tangled = self.tangled or bool(places - {self.inside})
            if self.inside is not None:
                self.reads[self.inside] |= made_of
        for t in made:
            t.lowbit_from, t.lowbit_in = made_of, self.inside
        return found


def _can_be_kept(returned: Any) -> bool:
    """Whether what a block returned has a structure that can be written to the disk."""
    try:
        treespec_dumps(tree_flatten(returned)[1])
    except NotImplementedError:
        return False
    return True


def is_container(value: Any) -> bool:
    """Whether a block can put something into this argument that others find there."""
    return isinstance(value, (MutableMapping, MutableSequence))


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _has_no_values(t: Tensor) -> bool:
    return t.numel() > 1 and not any(step for step, size in zip(t.stride(), t.shape) if size > 1)


def _zeros_for(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """Zeros of the shape that the result would have."""
    lower = func is not F.embedding and torch.is_autocast_enabled("cpu")

    def shape_only(t: Tensor) -> Tensor:
        return t.to("meta", torch.float32 if t.is_floating_point() else t.dtype)

    args, kwargs = tree_map_only(Tensor, shape_only, (tuple(args), dict(kwargs)))
    with torch._C.DisableTorchFunction():
        return torch.zeros(
            func(*args, **kwargs).shape, dtype=torch.get_autocast_dtype("cpu") if lower else torch.float32
        )
