"""Keys and values as a model makes them for its cache, and the gradient of its loss with respect to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from lowbit.kv.learning import Observed
from lowbit.kv.side import CacheSide

_CACHES = ("cache", "past_key_values")  # how forwards call it in transformers 5.24, and before
Seen = dict[tuple[int, str], tuple[CacheSide, list[Observed]]]


class Recorder(DynamicCache):
    """A cache that remembers what it is given and stores nothing.

    With gradients what it hands on is key + leaf, the leaf being zero, so that the gradient of a leaf is that of the loss with
    respect to the key.
    """

    def __init__(self, config: Any, gradients: bool) -> None:
        super().__init__(config=config)
        self.gradients = gradients
        self.states: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        out = []
        for which, x in (("k", key_states), ("v", value_states)):
            leaf = torch.zeros_like(x, requires_grad=True) if self.gradients else None
            self.states[layer_idx, which] = (x.detach(), leaf)
            out.append(x if leaf is None else x + leaf)
        return out[0], out[1]


def record(
    model: Any, windows: Sequence[Tensor], side_of: Callable[[int, str], CacheSide | None], gradients: bool
) -> Seen:
    """What each layer gave to the cache, for sides that `side_of` names; sinks left out. The model is as it was afterwards."""
    seen: Seen = {}
    device = next(iter(model.parameters())).device
    takes = inspect.signature(model.forward).parameters
    name = next((name for name in _CACHES if name in takes), _CACHES[0])
    training = model.training
    model.eval()
    try:
        for window in windows:
            ids = torch.atleast_2d(window).to(device)
            recorder = Recorder(model.config, gradients)
            with torch.set_grad_enabled(gradients):
                logits = model(input_ids=ids, use_cache=True, **{name: recorder}).logits
            _keep(recorder, _gradients(recorder, logits, ids) if gradients else {}, side_of, seen)
    finally:
        model.train(training)
    return seen


def _gradients(recorder: Recorder, logits: Tensor, ids: Tensor) -> dict[tuple[int, str], Tensor | None]:
    """Of the sum of -log p(next token) over a window."""
    loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
    keys = list(recorder.states)
    leaves = [leaf for _, leaf in recorder.states.values() if leaf is not None]
    return dict(zip(keys, torch.autograd.grad(loss, leaves, allow_unused=True), strict=True))


def _keep(
    recorder: Recorder,
    gradients: dict[tuple[int, str], Tensor | None],
    side_of: Callable[[int, str], CacheSide | None],
    seen: Seen,
) -> None:
    for (layer, which), (x, _) in recorder.states.items():
        side = side_of(layer, which)
        if side is not None:
            first = side.sinks if x.shape[-2] > side.sinks else 0
            gradient = gradients.get((layer, which))
            parts = [t if t is None else t[..., first:, :].cpu() for t in (x, gradient)]
            seen.setdefault((layer, which), (side, []))[1].append(Observed(parts[0], parts[1]))  # type: ignore[arg-type]
