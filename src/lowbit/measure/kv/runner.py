"""A decoder run over one sequence with any cache: hidden states first, logits of some positions after, so that memory never
holds those of a long context at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.running import check_vocabulary, device_of, evaluating
from lowbit.kv import CacheFormat
from lowbit.kv.cache_format import Which
from lowbit.kv.quantized_cache import QuantizedCache
from lowbit.measure.kv.attention import Seen, Unreadable, attending
from lowbit.measure.kv.stored import Cache, FormatCache
from lowbit.measure.scoring import kind_of
from lowbit.planning.kv_cache import kv_cache

_PROBE = 8  # tokens
_KEPT = 1 << 28  # bytes of hidden states of the float cache that are kept


@dataclass(frozen=True, eq=False)
class State:
    """What a sequence became: hidden states as the model gives them to its head, or its logits [tokens, vocabulary]."""

    hidden: Any = None
    logits: Tensor | None = None


class Runner:
    """A model that predicts the next token, in transformers. SourceError for one that does not.

    `parallel`: whether its layers attend through an interface by which all positions can be computed at once; if not,
    tokens go through a cache one by one. `layers`: how many of them keep keys and values.
    """

    def __init__(self, model: nn.Module) -> None:
        if kind_of(model) != "causal":
            raise SourceError("a check of the cache needs a model that predicts the next token from those before it")
        self.model, self.device = model, device_of(model)
        self._base = getattr(model, "base_model", None)
        takes = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        probe = torch.arange(3, 3 + _PROBE)
        whole = self._whole(probe)
        self.split = self._splits(probe, whole)
        self.parallel, self.layers = True, 0
        try:
            with evaluating(model), attending(model, _FLOAT) as layers:
                again = model(probe.to(self.device)[None], **self._options).logits[0]
            self.layers = max(layers, default=-1) + 1
            self.parallel = bool(layers) and torch.allclose(
                again, whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max())
            )
        except (Unreadable, ValueError, TypeError):
            self.parallel = False
        self._known: dict[bytes, State] = {}
        if not self.parallel:
            if not kv_cache(getattr(model, "config", None)).bytes_per_token:
                raise SourceError(f"{type(model).__name__} keeps no keys and values, so there is no cache to check")
            self.layers = int(getattr(getattr(model, "config", None), "num_hidden_layers", 0))

    def run(self, ids: Tensor, cache: Cache | None = None, seen: Seen | None = None) -> State:
        """ids [tokens] with this cache; the float one when None. seen: as of `attending`."""
        check_vocabulary(self.model, ids)
        if not self.parallel and cache is not None:
            return State(logits=self._stepwise(ids, cache))
        with attending(self.model, cache or _FLOAT, seen) if self.parallel else nullcontext():
            if not self.split:
                return State(logits=self._whole(ids))
            with evaluating(self.model):
                return State(hidden=self._base(ids.to(self.device)[None], **self._options))  # type: ignore[misc]

    def base(self, ids: Tensor) -> State:
        """The same with the float cache, kept where it is small, as the next format is measured beside it too."""
        key = ids.numpy().tobytes()
        if key not in self._known:
            state = self.run(ids)
            size = 0 if state.hidden is None else state.hidden.last_hidden_state.nbytes
            if not size or size * (len(self._known) + 1) > _KEPT:
                return state
            self._known[key] = state
        return self._known[key]

    def shapes(self, ids: Tensor) -> tuple[dict[int, int], dict[tuple[int, Which], int]]:
        """kv heads by layer, and channels of a head by layer and side."""
        heads: dict[int, int] = {}
        widths: dict[tuple[int, Which], int] = {}
        if self.parallel:

            def seen(layer: int, _: Tensor, key: Tensor, value: Tensor, __: object) -> None:
                heads[layer] = key.shape[0]
                widths[layer, "k"], widths[layer, "v"] = key.shape[-1], value.shape[-1]

            self.run(ids, None, seen)
        return heads, widths

    def logits(self, state: State, rows: slice) -> Tensor:
        """Logits [rows, vocabulary] of a part of the positions."""
        if state.logits is not None:
            return state.logits[rows]
        hidden = state.hidden.last_hidden_state[:, rows]
        with evaluating(self.model), self._base_gives(type(state.hidden)(last_hidden_state=hidden)):
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
            found: Tensor = self.model(ids, **self._options).logits[0]
            return found

    def _whole(self, ids: Tensor) -> Tensor:
        with evaluating(self.model):
            out = self.model(ids.to(self.device)[None], **self._options)
        if not isinstance(getattr(out, "logits", None), Tensor):
            raise SourceError(f"{type(self.model).__name__} gives no logits, so there is nothing to measure")
        found: Tensor = out.logits[0]
        return found

    @contextmanager
    def _base_gives(self, output: Any) -> Iterator[None]:
        """Within, the model without its head answers at once; what comes after it (head, scale, softcap) is the model's own."""
        base: Any = self._base
        base.forward = lambda *_, **__: output
        try:
            yield
        finally:
            del base.forward

    def _splits(self, ids: Tensor, whole: Tensor) -> bool:
        """Whether logits can be had of the hidden states of some positions alone."""
        base = self._base
        if base is None or base is self.model or "forward" in vars(base):
            return False
        try:
            with evaluating(self.model):
                out = base(ids.to(self.device)[None], **self._options)
            part = self.logits(State(hidden=out), slice(2, 5))
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError):
            return False
        return part.shape == whole[2:5].shape and torch.allclose(
            part, whole[2:5], rtol=1e-3, atol=1e-3 * float(whole.abs().max())
        )

    def _stepwise(self, ids: Tensor, cache: Cache) -> Tensor:
        """Logits [tokens, vocabulary], token by token through a cache of transformers."""
        if not isinstance(cache, FormatCache):
            raise SourceError(f"{type(self.model).__name__} attends in its own way, so that sides cannot be told apart")
        store = QuantizedCache(cache.format, self.model, cache.tables)
        name = "cache" if "cache" in inspect.signature(self.model.forward).parameters else "past_key_values"
        with evaluating(self.model):
            tokens = ids.to(self.device)[:, None, None]
            return torch.cat([self.model(token, use_cache=True, **{name: store}).logits[0] for token in tokens])


_FLOAT = FormatCache(CacheFormat())
