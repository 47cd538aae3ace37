"""A model whose weights come and go: built without memory, given the tensors that run and relieved of them again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Container, Mapping

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.formats import QTensor
from lowbit.interchange.hf.models import compute_unsaved, meta_model
from lowbit.interchange.source import Source
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import owner_of
from lowbit.nn.swap import place as place_packed

# What a forward may return besides its output, and nobody here reads.
_BESIDES = ("use_cache", "output_attentions", "output_hidden_states", "output_router_logits")


class Skeleton:
    """The float model of a source on the meta device, but for what its constructor computes (rotary frequencies)."""

    def __init__(self, source: Source, tied: Mapping[str, str]) -> None:
        if source.config is None:
            raise SourceError(
                f"{source.label} has no transformers config, so that it is not known how it reads text; "
                "use a method that needs no calibration"
            )
        self.module = meta_model(source.config)
        self.embeddings_dropped = False
        self._packed: list[nn.Module] = []
        self.tied = tied
        if hasattr(self.module, "set_experts_implementation"):
            with contextlib.suppress(ValueError, NotImplementedError):  # a mixture that has one implementation only
                self.module.set_experts_implementation("eager")  # one product an expert, so that each is seen
        for module in self.module.modules():
            config = getattr(module, "config", None)
            for name in _BESIDES if config is not None else ():
                if getattr(config, name, False):
                    setattr(config, name, False)
        compute_unsaved(self.module, {*source.tensors, *tied})

    def place(self, name: str, value: Tensor | PackedWeight | None, dtype: torch.dtype = torch.float32) -> None:
        """Give a parameter or buffer its values, floats in `dtype`, a packed weight as it is; None takes them away. Unknown names
        are left out."""
        self._make_room(name)
        if isinstance(value, PackedWeight):
            for one in self._names(name):
                place_packed(self.module, one, value)
            return
        found = self._owner(name)
        if found is None:
            return
        places, leaf = found
        self._unpack(name)
        old = places[leaf]
        if value is None:
            new = torch.empty_like(old, device="meta")
        else:
            new = value.to(dtype) if value.is_floating_point() else value
        kept = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        for alias in self._names(name):
            found = self._owner(alias)
            if found is not None:
                found[0][found[1]] = kept

    def place_packed(self, name: str, q: QTensor, dense: Callable[[], Tensor]) -> None:
        """Let look-ups read from the stored form, row by row, if only embeddings use `name`; else place `dense()`."""
        names = set(self._names(name))
        modules = dict(self.module.named_modules(remove_duplicate=False))
        owners = [modules[n.rpartition(".")[0]] for n in names if n.rpartition(".")[0] in modules]
        self.place(name, None)
        plain = [m for m in owners if type(m).forward is nn.Embedding.forward and isinstance(m, nn.Embedding)]
        heads = [m for m in owners if m not in plain and m is not self.module.get_output_embeddings()]
        if heads or any(m.max_norm is not None for m in plain) or q.select(torch.zeros(1, dtype=torch.int64)) is None:
            self.place(name, dense())
            return
        for module in plain:
            module.forward = q.index  # type: ignore[method-assign]
            self._packed.append(module)

    def _unpack(self, name: str) -> None:
        """Undo `place_packed`."""
        for known_as in (
            (name, *(alias for alias, canonical in self.tied.items() if canonical == name)) if self._packed else ()
        ):
            owner = self._module(known_as.rpartition(".")[0])
            if owner is not None and owner in self._packed:
                self._packed.remove(owner)
                owner.__dict__.pop("forward", None)

    def _module(self, path: str) -> nn.Module | None:
        try:
            return self.module.get_submodule(path)
        except AttributeError:
            return None

    def drop_embeddings(self, kept: Container[str] = ()) -> None:
        """From now on embeddings look up zeros, and their memory is free; those whose weights are `kept` by name stay."""
        names = {id(m): f"{path}.weight" for path, m in self.module.named_modules()}
        for module in (m for m in self._embeddings() if names.get(id(m)) not in kept):
            module.forward = _zeros_of(module)  # type: ignore[method-assign]
            module.weight = nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
        self._packed.clear()
        for alias, canonical in self.tied.items():
            found = self._owner(canonical)
            if found is not None and found[0][found[1]].is_meta:
                self.place(alias, None)
        self.embeddings_dropped = True

    def _embeddings(self) -> list[nn.Embedding]:
        # A class that looks up in its own way, such as OPT's positions, is left alone: it is never the large one.
        plain = [m for m in self.module.modules() if type(m).forward is nn.Embedding.forward]
        return [m for m in plain if isinstance(m, nn.Embedding) and (m in self._packed or not m.weight.is_meta)]

    def get(self, name: str) -> Tensor:
        """The parameter or buffer as it is."""
        found = self._owner(name)
        if found is None:
            raise SourceError(f"{type(self.module).__name__} has no tensor {name!r}")
        value: Tensor = found[0][found[1]]
        return value

    def _names(self, name: str) -> tuple[str, ...]:
        """A tensor by each of its names."""
        return (name, *(alias for alias, canonical in self.tied.items() if canonical == name))

    def _make_room(self, name: str) -> None:
        """Where a packed weight stands, a parameter without memory stands again."""
        for one in self._names(name):
            with contextlib.suppress(SourceError):  # a tensor that the model does not know
                owner, leaf = owner_of(self.module, one)
                packed = owner._modules.get(leaf)
                if isinstance(packed, PackedWeight):
                    del owner._modules[leaf]
                    owner.register_parameter(leaf, nn.Parameter(torch.empty(packed.shape, device="meta"), False))

    def _owner(self, name: str) -> tuple[dict[str, Tensor], str] | None:
        path, _, leaf = name.rpartition(".")
        owner = self._module(path)
        for places in () if owner is None else (owner._parameters, owner._buffers):
            if places.get(leaf) is not None:
                return places, leaf  # type: ignore[return-value]
        return None


def _zeros_of(module: nn.Embedding) -> Callable[..., Tensor]:
    """A look-up of zeros, which the model may write to."""
    return lambda ids: torch.zeros(*ids.shape, module.embedding_dim)
