"""Where the tensors of a folder stand in a model of another class than the one that was quantized.

A folder has the names of the class that it was made of: a causal language model has `model.layers.0...` where the model without
a head has `layers.0...`, and a model of text and images has its text model somewhere inside. transformers has rules that lead
from one to the other, for the tensors of a float checkpoint. They are asked here for the weight as a whole, because they know
no parts of packed weights, and what they answer holds for its parts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.core_model_loading import WeightRenaming

from lowbit.errors import SourceError
from lowbit.interchange.checks.section import Packed
from lowbit.interchange.hf.conversion import renames
from lowbit.interchange.hf.loading import load_config
from lowbit.interchange.hf.models import meta_model
from lowbit.interchange.hf.published import same_tensors
from lowbit.interchange.hf.section import as_float

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Fit:
    """What a model of some class takes from a folder.

    packed   name of a packed weight in the model -> its name in the folder
    tied     alias -> name, both in the model, of what shares one tensor; names of packed weights are those of `packed`
    files    name of a tensor in the files -> its name in the model; empty where the files were not given
    """

    packed: Mapping[str, str]
    tied: Mapping[str, str]
    files: Mapping[str, str]


def fit(
    model: PreTrainedModel, tensors: Mapping[str, Packed], tied: Mapping[str, str], stored: Collection[str] = (),
    folder: Path | None = None,
) -> Fit:  # fmt: skip
    """How the packed `tensors` of a folder, and what is `tied` to what there, stand in the empty float `model`.

    `stored`: the names of all tensors in the files, `folder`: where they lie. A class that is not the folder's own takes what it has, as transformers has
    it for float checkpoints; SourceError where that is nothing at all. Names that the folder's own class lacks stay, for the
    caller to refuse.
    """
    parts = {f"{name}.{part}": name for name, packed in tensors.items() for part in packed.parts()}
    plain = [name for name in stored if name not in parts]
    own = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    names = renames(model, [*tensors, *tied, *plain])
    if not own and folder is not None and set(model.state_dict()) - set(names.values()):
        names = _by_checkpoint(model, folder) | names
    if own:
        names = {name: name for name in (*tensors, *tied)} | names
    spots: dict[str, list[str]] = {}  # packed weight of the folder -> its names in the model
    for name in (*tensors, *tied):
        owner = tied.get(name, name)
        if owner in tensors and name in names:
            spots.setdefault(owner, []).append(names[name])
    if tensors and not spots and not any(name in names for name in plain):
        written = " or ".join(getattr(model.config, "architectures", None) or ["the class that config.json names"])
        raise SourceError(
            f"a {type(model).__name__} has none of the weights of this folder, so all of it would be random; load it as "
            f"{written} or as a class that shares its weights"
        )
    if stored or not own:
        _add_own_ties(model, spots, {names[name] for name in plain if name in names})
    owners = set(model.all_tied_weights_keys.values())
    first = {owner: next((n for n in found if n in owners), found[0]) for owner, found in spots.items()}
    ties = {alias: first[owner] for owner, found in spots.items() for alias in found if alias != first[owner]}
    ties |= {names[a]: names[n] for a, n in tied.items() if n not in tensors and a in names and n in names}
    files = {part: part.replace(owner, first[owner], 1) for part, owner in parts.items() if owner in first}
    files |= {name: names[name] for name in plain if name in names}
    return Fit({name: owner for owner, name in first.items()}, ties, files if stored else {})


def _by_checkpoint(model: PreTrainedModel, folder: Path) -> dict[str, str]:
    """Name in the model of a folder -> name in `model`, by way of the checkpoint that the first one would be published as."""
    try:
        return same_tensors(meta_model(as_float(load_config(folder))), model, str(folder))
    except SourceError:  # no rule of transformers leads there, so none would for the float model
        return {}


def _add_own_ties(model: PreTrainedModel, spots: Mapping[str, list[str]], floats: Collection[str]) -> None:
    """What the class ties to a packed weight and the folder knows nothing of, such as the head that its own class lacks."""
    at = {name: found for found in spots.values() for name in found}
    for pair in model.all_tied_weights_keys.items():
        for alias, name in (pair, pair[::-1]):
            if name in at and alias not in at and alias not in floats:
                at[name].append(alias)
                at[alias] = at[name]


class Exactly(WeightRenaming):  # type: ignore[misc]
    """A rule of transformers that renames every tensor by a table."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("lowbit", "lowbit")
        self.names = names

    def rename_source_key(self, source_key: str) -> tuple[str, Any]:
        """(new name, None), as transformers asks for it."""
        return self.names.get(source_key, source_key), None
