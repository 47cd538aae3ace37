"""From the names and layout of a checkpoint to those of the transformers-5 model, one tensor at a time.

transformers renames, splits, stacks and concatenates checkpoint tensors while it loads a whole
model. Here its own rules (`core_model_loading`) are planned once on meta tensors, which gives
every shape without reading data, and are then run for one target when it is asked for.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lowbit.errors import SourceError
from lowbit.interchange.checks.tensors import fields_with
from lowbit.interchange.hf.calls import one_line
from lowbit.interchange.inventory import tied_names
from lowbit.interchange.tensors import TensorSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ReadPart = Callable[[str], torch.Tensor]


@dataclass
class _Group:
    """Checkpoint tensors that become one or several model tensors together.

    parts      (source pattern, checkpoint name), in transformers' order
    converter  its WeightConverter, None for a mere renaming
    """

    first_target: str
    converter: Any = None
    parts: list[tuple[str, str]] = field(default_factory=list)

    def run(self, model: PreTrainedModel, read: ReadPart) -> dict[str, torch.Tensor]:
        """The model tensors that the parts become."""
        if self.converter is None:
            return {self.first_target: read(self.parts[0][1])}
        converter = copy.deepcopy(self.converter)
        for pattern, key in self.parts:
            converter.add_tensor(self.first_target, key, pattern, lambda key=key: read(key))
        made = converter.convert(self.first_target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class Conversion:
    """How a checkpoint becomes a model.

    specs    model tensors in the model's order, canonical names only
    untied   aliases that the checkpoint holds besides their canonical tensor
    extra    checkpoint names that the model does not know
    dropped  checkpoint names that transformers leaves unread on purpose
    """

    specs: Mapping[str, TensorSpec]
    untied: frozenset[str]
    extra: tuple[str, ...]
    dropped: tuple[str, ...]
    _model: PreTrainedModel
    _groups: Mapping[str, _Group]
    _stored_as: Mapping[str, str]

    def read(self, name: str, read_part: ReadPart) -> torch.Tensor:
        """The model tensor `name`, made from the checkpoint tensors that `read_part` reads."""
        stored = self._stored_as[name]
        return self._groups[stored].run(self._model, read_part)[stored].contiguous()

    def only_renames(self, name: str) -> bool:
        """Whether `name` is a single checkpoint tensor as it is."""
        group = self._groups[self._stored_as[name]]
        return group.converter is None and len(group.parts) == 1

    def parts(self, name: str) -> tuple[str, ...]:
        """The checkpoint tensors that `name` is made of."""
        return tuple(key for _, key in self._groups[self._stored_as[name]].parts)


def plan_conversion(
    model: PreTrainedModel,
    checkpoint: Mapping[str, TensorSpec],
    where: str,
    transforms: Sequence[Any] | None = None,
    same: Callable[[str, str], bool] = lambda a, b: False,
) -> Conversion:
    """Plan how the tensors of `checkpoint` become those of the meta `model`. Reads no data.

    `transforms` replaces the model's own list of renamings and converters. `same(a, b)` compares two
    checkpoint tensors by value: it is asked only when a checkpoint holds both names of a tied tensor.
    SourceError names missing parameters and tensors of a wrong shape.
    """
    wanted = model.state_dict()
    groups, unknown = _group(model, checkpoint, wanted, transforms)
    made: dict[str, _Group] = {}
    specs: dict[str, TensorSpec] = {}
    for group in groups.values():
        for name, tensor in _dry_run(group, model, checkpoint, where).items():
            if name not in wanted:
                unknown.extend((key, name) for _, key in group.parts)
                continue
            made[name] = group
            specs[name] = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
    wrong = [name for name in specs if specs[name].shape != tuple(wanted[name].shape)]
    if wrong:
        name = wrong[0]
        raise SourceError(
            f"{where}: tensor {name!r} has shape {list(specs[name].shape)} but config.json asks for "
            f"{list(wanted[name].shape)}{_asked(model, wanted[name].shape, specs[name].shape)}{_more(wrong)}; the weights and the config are of different models"
        )
    stored_as, untied = _tie(tied_names(model), made, same)
    canonical = [name for name in wanted if name in stored_as]
    missing = [n for n in wanted if n not in stored_as and tied_names(model).get(n) not in stored_as]
    missing = [n for n in missing if not unread(model, n)]
    if missing:
        raise SourceError(
            f"{where}: the weights lack {len(missing)} of {len(wanted)} tensors of {type(model).__name__}: "
            f"{', '.join(missing[:5])}{_more(missing, 5)}; download the model again or correct config.json"
        )
    dropped = {key for key, name in unknown if _unread_on_purpose(model, name)}
    return Conversion(
        specs={n: TensorSpec(n, specs[stored_as[n]].shape, specs[stored_as[n]].dtype) for n in canonical},
        untied=untied,
        extra=tuple(sorted({key for key, _ in unknown} - dropped)),
        dropped=tuple(sorted(dropped)),
        _model=model,
        _groups=made,
        _stored_as=stored_as,
    )


def makes(model: PreTrainedModel, checkpoint: Mapping[str, TensorSpec], where: str) -> dict[str, tuple[str, ...]]:
    """Name in the meta `model` -> the tensors of `checkpoint` that it is made of, of what can be made of these. SourceError for odd shapes."""
    wanted = model.state_dict()
    groups, _ = _group(model, checkpoint, wanted, None)
    return {
        name: tuple(key for _, key in group.parts)
        for group in groups.values()
        for name in _dry_run(group, model, checkpoint, where)
        if name in wanted
    }


def renames(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """Name in a model of some class -> the name of the same tensor in `model`, of those `names` that it has and takes as they are.

    Mostly the prefix of the base model is all that differs. The rules for checkpoints come after that, because names of
    models need not survive them.
    """
    found: dict[str, str] = {}
    wanted = model.state_dict()
    for rules in ((), None):
        groups, _ = _group(model, [name for name in names if name not in found], wanted, rules)
        taken = set(found.values())
        alone = {name: group for name, group in groups.items() if group.converter is None and name not in taken}
        found |= {group.parts[0][1]: name for name, group in alone.items()}
    return found


def _group(
    model: PreTrainedModel,
    checkpoint: Iterable[str],
    wanted: dict[str, Any],
    transforms: Sequence[Any] | None,
) -> tuple[dict[str, _Group], list[tuple[str, str]]]:
    """Sort checkpoint names into groups by model name; also (checkpoint name, renamed) of those that fit none.

    The order and the two attempts at a name are those of `convert_and_load_state_dict_in_model`.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(model) if transforms is None else list(transforms)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    prefix = model.base_model_prefix
    groups: dict[str, _Group] = {}
    unknown = []
    for key in sorted(checkpoint, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, wanted)
        if name not in wanted and key in wanted:
            name, pattern = rename_source_key(key, [], [], prefix, wanted)
        if name not in wanted:
            unknown.append((key, name))
        elif pattern is not None:
            groups.setdefault(name, _Group(name, by_pattern[pattern])).parts.append((pattern, key))
        elif name in groups:
            unknown.append((key, name))  # two checkpoint tensors for one parameter: the first one holds
        else:
            groups[name] = _Group(name, None, [(key, key)])
    return groups, unknown


def _dry_run(
    group: _Group, model: PreTrainedModel, checkpoint: Mapping[str, TensorSpec], where: str
) -> dict[str, torch.Tensor]:
    """Run a group on meta tensors for the names, shapes and dtypes that come out."""

    def meta(key: str) -> torch.Tensor:
        return torch.empty(checkpoint[key].shape, dtype=checkpoint[key].dtype, device="meta")

    try:
        return group.run(model, meta)
    except Exception as error:  # the rules are transformers'; what they raise on odd shapes is open
        raise SourceError(
            f"{where}: cannot make {group.first_target!r} from {', '.join(k for _, k in group.parts[:4])}"
            f"{_more(group.parts, 4)}: {one_line(error)}; the weights and the config are of different models"
        ) from error


def _tie(
    tied: Mapping[str, str], made: Mapping[str, _Group], same: Callable[[str, str], bool]
) -> tuple[dict[str, str], frozenset[str]]:
    """(canonical model name -> name under which its data was found, aliases that differ from their canonical).

    As in transformers: an alias in the checkpoint stands in for an absent canonical tensor, and when
    both are there with different values they are not tied.
    """
    stored_as = {name: name for name in made if name not in tied}
    untied = set()
    for alias, canonical in tied.items():
        if alias not in made:
            continue
        if canonical not in stored_as:
            stored_as[canonical] = alias
            continue
        other = made[stored_as[canonical]]
        simple = made[alias].converter is None and other.converter is None
        if not (simple and same(made[alias].parts[0][1], other.parts[0][1])):
            stored_as[alias] = alias
            untied.add(alias)
    return stored_as, frozenset(untied)


def _unread_on_purpose(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers ignores a checkpoint tensor of this (renamed) name when it is not expected."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [buffer for buffer, _ in model.named_buffers()]
    if any(buffer.endswith("rotary_emb.inv_freq") for buffer in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(buffer.endswith("position_ids") for buffer in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return _matches(name, patterns)


def unread(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers does without a tensor of this name where the weights have none."""
    return _matches(name, model._keys_to_ignore_on_load_missing)


def _matches(name: str, patterns: Iterable[str] | None) -> bool:
    return any(re.search(pattern, name) for pattern in patterns or ())


def _asked(model: PreTrainedModel, wanted: Sequence[int], found: Sequence[int]) -> str:
    """The fields of the config that name the sizes which the weights do not have."""
    differing = [size for i, size in enumerate(wanted) if tuple(found[i : i + 1]) != (size,)]
    return fields_with(model.config.to_dict(), differing)


def _more(items: Sequence[Any], shown: int = 1) -> str:
    return f" and {len(items) - shown} more" if len(items) > shown else ""
