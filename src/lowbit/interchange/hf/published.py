"""From the tensors of a model back to those of a checkpoint: the names and pieces that `save_pretrained` gives them.

transformers' rules that split, stack and join checkpoint tensors while loading are run backwards on what belongs together: q, k
and v that come from one matrix, the experts of a layer. Which tensors those are is not asked of the backward rules but of the
forward ones, which are what a reader will run, and what they make of the pieces is held against the tensors they were made from. So
a rule of transformers that cannot be turned round never leads to another model: the tensors keep the names that the model
has for them where the forward rules take these, else nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit.errors import SourceError
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.hf.conversion import Conversion, makes, plan_conversion
from lowbit.interchange.inventory import tied_names
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Together:
    """Tensors of the model, `names`, that are written as the tensors `pieces` of a checkpoint."""

    names: tuple[str, ...]
    pieces: Mapping[str, TensorSpec]


class Published:
    """How the tensors `specs` of a meta `model` are written; `groups` in the order of the model.

    SourceError when transformers would not read back from it what it was made of.
    """

    def __init__(self, model: PreTrainedModel, specs: Mapping[str, TensorSpec], where: str) -> None:
        self._model, self._where = model, where
        try:
            written = _specs_of(self._reverted({name: _meta(spec) for name, spec in specs.items()}))
            self._forward = self._held(specs, written)
            self.groups = _groups(self._forward, specs, written)
            for group in self.groups:
                if len(group.names) > 1 or set(group.pieces) != set(group.names):
                    alone = self._reverted({name: _meta(specs[name]) for name in group.names})
                    if _specs_of(alone) != dict(group.pieces):
                        raise SourceError(
                            f"{where}: {group.names[0]!r} is saved together with others than it is read with"
                        )
        except SourceError:
            self._forward = self._held(specs, specs)
            self.groups = tuple(Together((name,), {name: spec}) for name, spec in specs.items())

    def parts(self, name: str) -> tuple[str, ...]:
        """The pieces that a tensor of the model is read from."""
        return self._forward.parts(name)

    def tensors(self, group: Together, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The pieces of one group, contiguous. SourceError when `values` do not come back from them bit for bit."""
        if set(group.pieces) == set(group.names):
            return {name: values[name].contiguous() for name in group.names}
        made = {name: value.contiguous() for name, value in self._reverted(values).items()}
        for name in group.names:
            back = self._forward.read(name, made.__getitem__)
            if back.dtype != values[name].dtype or not torch.equal(back, values[name]):
                raise SourceError(
                    f"{self._where}: {name!r} does not come back from what transformers saves of it ({', '.join(made)}), so a "
                    "folder of it would be another model; nothing was kept of it"
                )
        return made

    def _held(self, specs: Mapping[str, TensorSpec], written: Mapping[str, TensorSpec]) -> Conversion:
        """The forward rules for `written`, when they give every tensor of `specs` and no other."""
        forward = plan_conversion(self._model, written, self._where)
        lost = sorted(set(specs) - set(forward.specs)) + list(forward.extra) + list(forward.dropped)
        if lost or any(forward.specs[name] != spec for name, spec in specs.items()):
            raise SourceError(
                f"{self._where}: transformers would not read {lost[0] if lost else 'its tensors'!r} back from what it saves of "
                f"{type(self._model).__name__}, so a folder of it would be another model; nothing was written"
            )
        return forward

    def _reverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return as_saved(self._model, tensors)
        except Exception as error:  # the rules are transformers'
            raise SourceError(
                f"{self._where}: transformers cannot name its tensors for saving ({one_line(error)})"
            ) from error


def same_tensors(model: PreTrainedModel, other: PreTrainedModel, where: str) -> dict[str, str]:
    """Name in the meta `model` -> name in the meta `other` of what both make of the same tensors of a published checkpoint.

    SourceError where what `model` saves is not what it reads.
    """
    state = model.state_dict()
    tied = tied_names(model)
    specs = {n: TensorSpec(n, tuple(t.shape), t.dtype) for n, t in state.items() if n not in tied}
    published = Published(model, specs, where)
    pieces = {name: spec for group in published.groups for name, spec in group.pieces.items()}
    mine: dict[tuple[str, ...], list[str]] = {}
    for name in specs:
        mine.setdefault(published.parts(name), []).append(name)
    theirs: dict[tuple[str, ...], list[str]] = {}
    for name, parts in makes(other, pieces, where).items():
        theirs.setdefault(parts, []).append(name)
    return {a: b for parts, names in mine.items() for a, b in zip(names, theirs.get(parts, ()), strict=False)}


def as_saved(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model under the names and in the pieces that `save_pretrained` gives them; any error of transformers' rules."""
    from transformers.core_model_loading import revert_weight_conversion

    made: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return made


def _groups(
    forward: Conversion, specs: Mapping[str, TensorSpec], written: Mapping[str, TensorSpec]
) -> tuple[Together, ...]:
    """Model tensors that share a checkpoint tensor, and all the checkpoint tensors they are made of."""
    owner: dict[str, str] = {}  # checkpoint tensor -> the first model tensor that it is part of
    first: dict[str, str] = {}  # model tensor -> the first one of its group
    for name in specs:
        found = [owner[key] for key in forward.parts(name) if key in owner]
        root = first[found[0]] if found else name
        joined = {first[other] for other in found}
        first.update({n: root for n, old in first.items() if old in joined} if len(joined) > 1 else {})
        first[name] = root
        owner.update({key: name for key in forward.parts(name) if key not in owner})
    members: dict[str, list[str]] = {}
    for name in specs:
        members.setdefault(first[name], []).append(name)
    return tuple(
        Together(tuple(names), {key: written[key] for key in dict.fromkeys(k for n in names for k in forward.parts(n))})
        for names in members.values()
    )


def _meta(spec: TensorSpec) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device="meta")


def _specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
