"""How far keys and values go: a quantized model runs over text, and its cache is watched. For exports with `kv=`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lowbit.calibration.data import LENGTH, SAMPLES, Calibration, load_calibration
from lowbit.calibration.decoding import cache_name
from lowbit.errors import ExportError
from lowbit.interchange.exporters.common.kv_ranges import KVRanges, stored
from lowbit.interchange.exporters.exporter import Exporter
from lowbit.interchange.files.weights import weight_files
from lowbit.interchange.hf.running import device_of, evaluating
from lowbit.interchange.progress import Progress
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.pipeline.loading import load

_COMPARED = 64  # tokens whose logits say what rounding keys and values costs


class _Watched(DynamicCache):
    """A cache that passes what comes in to `on_update(keys, values, layer)`, and keeps what that returns.

    Keys come rotated, [batch, heads of keys, tokens, head_dim]; a layer with a window shows what it will drop too.
    """

    def __init__(self, config: Any, on_update: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> None:
        super().__init__(config=config)
        self._on_update = on_update

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._on_update(key_states, value_states, layer_idx)
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return found


def with_kv(
    kind: Exporter, folder: LowbitFolder, kv: str, text: Mapping[str, Any], progress: Progress | None = None
) -> tuple[Exporter, str]:
    """The exporter with scales of a KV cache, and what that costs, in words.

    `text`: calibration, samples, length and chat as in `quantize`; None for as much as usual. TextError for one that
    cannot be read, ExportError as in `kv_ranges`.
    """
    found = load_calibration(
        text["calibration"], None, folder.dense(), samples=text["samples"] or SAMPLES, length=text["length"] or LENGTH,
        chat=text["chat"],
    )  # fmt: skip
    model = load(folder.folder, torch.float32, kernel="expand")  # the reference: same command, same scales
    size = sum(file.stat().st_size for file in weight_files(folder.folder))
    on_window = (lambda window: progress(f"keys and values: {window}", 0, size)) if progress else (lambda window: None)
    ranges = kv_ranges(model, found, kv, on_window)
    cost = kv_cost(model, found.ids[0], ranges)
    note = f"{kv} keys and values move the logits by {cost:.1e} of their size, at the end of the first window"
    return kind.with_kv(ranges), note


def kv_ranges(
    model: Any, text: Calibration, kind: str, on_window: Callable[[str], None] = lambda window: None
) -> KVRanges:
    """The largest |key| and |value| that each layer of `model` keeps while it reads `text`, a window at a time.

    The cache of one window is in memory, and no logits. `on_window` is given each window's name as its reading begins.
    ExportError when a layer keeps nothing, or something that is not finite.
    """
    config = model.config
    peaks: dict[int, list[float]] = {}

    def record(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        known = peaks.setdefault(layer, [0.0, 0.0])
        for i, x in enumerate((keys, values)):
            peak = float(x.abs().amax())
            if not math.isfinite(peak):
                raise ExportError(
                    f"layer {layer} has keys or values that are not finite on {text.name}; quantize it anew"
                )
            known[i] = max(known[i], peak)
        return keys, values

    for i, window in enumerate(text.ids):
        on_window(f"window {i + 1} of {len(text.ids)}")
        _run(model.base_model, window, _Watched(config, record))
    layers = int(config.get_text_config(decoder=True).num_hidden_layers)
    if sorted(peaks) != list(range(layers)):
        raise ExportError(f"{len(peaks)} of {layers} layers keep keys and values of their own; export without kv")
    words = f"{len(text.ids)} windows ({text.tokens:,} tokens) of {text.name}"
    return KVRanges(kind, words, tuple((peaks[i][0], peaks[i][1]) for i in range(layers)))


def kv_cost(model: Any, window: Tensor, ranges: KVRanges) -> float:
    """|a - b| / |b| of the logits of a window's last tokens, b: of `model`, a: with keys and values as they will be kept."""

    def rounded(keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        pairs = zip((keys, values), ranges.scales(layer), strict=True)
        k, v = (stored(x, ranges.kind, scale).to(x.dtype) for x, scale in pairs)
        return k, v

    plain = _run(model, window, _Watched(model.config, lambda keys, values, layer: (keys, values)))
    changed = _run(model, window, _Watched(model.config, rounded))
    a, b = (out.logits[:, -_COMPARED:].double() for out in (changed, plain))
    return float((a - b).norm() / b.norm())


def _run(module: nn.Module, window: Tensor, cache: DynamicCache) -> Any:
    """What a decoder gives for a window [tokens]; few logits where it can leave the others out."""
    name = cache_name(module)
    few = {"logits_to_keep": _COMPARED} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    with evaluating(module), torch.inference_mode():
        ids = window[None].to(device_of(module))
        return module(input_ids=ids, use_cache=True, **{str(name): cache}, **few)
