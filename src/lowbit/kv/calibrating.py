"""Calibration of a cache: levels, scales and outlier channels for each layer, from a model and text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.kv.learning import Observed, learn_tables
from lowbit.kv.side import CacheSide
from lowbit.kv.tables import TablesOfLayers

if TYPE_CHECKING:
    from lowbit.kv.cache_format import CacheFormat


def calibrate(model: Any, windows: Sequence[Tensor], cache: CacheFormat) -> TablesOfLayers:
    """Tables of every layer and side that has some to learn: {(layer, "k" or "v"): Tables}; empty where none has.

    model: one of transformers that predicts tokens, float or quantized. windows: token ids int64 [tokens] or [batch, tokens]; each
    starts a sequence, and its sinks do not count. Errors weigh by their share in the loss, the square of its gradient with
    respect to each key and value (an estimate of the diagonal of the Fisher information, KVQuant, arXiv 2401.18079, 3.3),
    where something of the side looks at weights. RecipeError for encoder-decoders and without windows.
    """
    # Nothing is imported that costs time where nothing is to be learned.
    if not any(_learns(side) for side in cache.sides):
        return {}
    if not len(windows):
        raise RecipeError(f"the cache {cache} is calibrated on text, and there is none")
    if getattr(model.config, "is_encoder_decoder", False):
        raise RecipeError(f"the cache {cache} is calibrated, which is not possible for encoder-decoders; use int8")
    from lowbit.kv.recording import record

    def side_of(layer: int, which: str) -> CacheSide | None:
        side = cache.side(layer, which)  # type: ignore[arg-type]
        return side if _learns(side) else None

    seen = record(model, windows, side_of, any(_weighs(side) for side in cache.sides))
    return {key: learn_tables(side, Observed.joined(parts)) for key, (side, parts) in sorted(seen.items())}


def _learns(side: CacheSide) -> bool:
    return side.calibrated or side.outliers > 0


def _weighs(side: CacheSide) -> bool:
    """Whether learning looks at the weights of errors."""
    if side.format is None or not side.calibrated:
        return False
    return side.format.codebook is not None or side.fit_used.method.weighs
