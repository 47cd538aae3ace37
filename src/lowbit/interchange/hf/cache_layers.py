"""Layers of transformers' cache that keep their keys and values in stores of somebody else's.

A layer decides what generation asks of it (windows, beams, crop); a store (`States`) holds the numbers. Everything that transformers does to
the tensors `keys` and `values` of its own layers is done to the stores here, and whoever reads `keys` gets them expanded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


class States(Protocol):
    """The keys or the values of one layer, [batch, heads, tokens, width], by position."""

    length: int
    recording: bool

    def reset(self) -> None: ...
    def append(self, x: Tensor) -> Tensor: ...
    def read(self, query: int, start: int = 0) -> Tensor: ...
    def crop(self, tokens: int) -> None: ...
    def drop_before(self, position: int) -> None: ...
    def each(self, change: Callable[[Tensor], Tensor]) -> None: ...
    def to(self, device: torch.device | str) -> None: ...
    @property
    def nbytes(self) -> int: ...


class StoredLayer(DynamicLayer):
    """A layer of full attention whose keys and values are in `stores`: (keys, values), set right after it was made."""

    stores: tuple[States, States]
    record_past = False

    @property
    def keys(self) -> Tensor | None:
        """All keys as the next query reads them, expanded for the one who asks; None where there are none."""
        return self._read(0)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._replace(0, value)

    @property
    def values(self) -> Tensor | None:
        """All values, as `keys`."""
        return self._read(1)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._replace(1, value)

    def _read(self, which: int) -> Tensor | None:
        store = self._stores[which] if self._stores else None
        return None if store is None or not store.length else store.read(store.length)

    def _replace(self, which: int, value: Tensor | None) -> None:
        """Somebody sets a tensor: it is stored instead of what there was."""
        if self._stores:
            self._stores[which].reset()
            if value is not None and value.numel():
                self._stores[which].append(value)

    @property
    def _stores(self) -> tuple[States, ...]:
        return getattr(self, "stores", ())

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values as they are held."""
        return sum(store.nbytes for store in self._stores)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for store in self._stores:
            store.recording = self.record_past
        return self.stores[0].append(key_states), self.stores[1].append(value_states)

    def activate_past_recording(self) -> None:
        """From now on a `crop` can take back the tokens since the one before, and all is as if they had never come."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.stores[0].length

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError("crop takes a negative number: how many tokens to remove from the end")
        for store in self._stores:
            store.recording = False
            store.crop(-tokens_to_remove)

    def reset(self) -> None:
        for store in self._stores:
            store.reset()
        self.is_initialized = False
        if hasattr(self, "cumulative_length"):
            self.cumulative_length = 0

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for store in self._stores:
            store.each(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda t: t[indices.to(t.device)])

    def offload(self) -> None:
        for store in self._stores:
            store.to("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            for store in self._stores:
                store.to(self.device)


class StoredSlidingLayer(StoredLayer, DynamicSlidingWindowLayer):
    """The same for a sliding window: what no later query can see is dropped."""

    def __init__(self, sliding_window: int, **kwargs: Any) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window=sliding_window)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.cumulative_length
        keys, values = StoredLayer.update(self, key_states, value_states)
        self.cumulative_length = before + key_states.shape[-2]
        visible = key_states.shape[-2] + min(before, self.sliding_window - 1)
        if not self.record_past:
            self._forget()
        return keys[..., -visible:, :], values[..., -visible:, :]

    def _forget(self) -> None:
        for store in self._stores:
            store.drop_before(self.cumulative_length - self.sliding_window + 1)

    def _read(self, which: int) -> Tensor | None:
        found = super()._read(which)
        return found if found is None or self.record_past else found[..., -self.sliding_window + 1 :, :]

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "this layer has forgotten what it would need again after a crop; call activate_past_recording() before "
                "the tokens come that may be taken back"
            )
        StoredLayer.crop(self, tokens_to_remove)
        self.cumulative_length = max(0, self.cumulative_length + tokens_to_remove)
        self._forget()


class StoredIndexedLayer(DynamicIndexedLayer, StoredLayer):
    """The same for attention that chooses keys by an index, which stays as it is."""


class _WithLinearState(StoredLayer):
    """What a layer does that also has a state of linear attention, which stays as it is. `part` is the other of its two halves."""

    part: type[StoredLayer]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # states of keys and values come by position, those of linear attention by name
        (self.part if args else LinearAttentionLayer).lazy_initialization(self, *args, **kwargs)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def offload(self) -> None:
        self.part.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        self.part.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        self.part.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        self.part.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self.part.crop(self, tokens_to_remove)


class StoredHybridLayer(_WithLinearState, LinearAttentionAndFullAttentionLayer):
    """Full attention whose keys and values are stored, beside linear attention."""

    part = StoredLayer


class StoredHybridSlidingLayer(_WithLinearState, LinearAttentionAndSlidingWindowAttentionLayer, StoredSlidingLayer):
    """The same with a sliding window."""

    part = StoredSlidingLayer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return StoredSlidingLayer.update(self, key_states, value_states, *args, **kwargs)

    def get_seq_length(self) -> int:
        return self.cumulative_length


_INSTEAD: dict[type, type[StoredLayer]] = {
    DynamicLayer: StoredLayer,
    DynamicSlidingWindowLayer: StoredSlidingLayer,
    DynamicIndexedLayer: StoredIndexedLayer,
    LinearAttentionAndFullAttentionLayer: StoredHybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: StoredHybridSlidingLayer,
}
_WITHOUT_KEYS = (DummyLayer, LinearAttentionLayer)


def has_states(layer: object) -> bool:
    """Whether a layer of a cache has keys and values of its own: not a linear one, nor one that reads another's."""
    return not isinstance(layer, _WITHOUT_KEYS) or isinstance(
        layer, (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
    )


def with_stores(layer: Any, stores: tuple[States, States]) -> StoredLayer | None:
    """A layer that does what this empty one does with its states in `stores`; None for kinds that are not known here."""
    kind = _INSTEAD.get(type(layer))
    if kind is None:
        return None
    given = {name: getattr(layer, name) for name in ("sliding_window", "number_of_states") if hasattr(layer, name)}
    made = kind(**given)
    made.stores = stores
    return made


def layer_bytes(layer: Any) -> int:
    """Bytes of all that a layer holds, of whatever kind it is."""
    if isinstance(layer, StoredLayer):
        rest = [value for name, value in vars(layer).items() if name != "stores"]
        return layer.nbytes + _bytes(rest)
    return _bytes(list(vars(layer).values()))


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size() if value.dim() > 1 else 0
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0
