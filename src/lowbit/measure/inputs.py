"""What a model that predicts no tokens is called with: text, images and sounds, by the names of the arguments of its forward.

Which arguments it has is asked of its own code. Images and sounds are those of the user, or are made here (`synthetic.py`); what turns them into
numbers is the processor of the model's folder. Where it has none, images are resized to the size in the config, with values from -1
to 1, and sounds get the mean 0 and the variance 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.errors import SourceError, TextError
from lowbit.interchange.hf.processors import feature_extractor, image_processor, processed
from lowbit.interchange.hf.running import max_positions
from lowbit.interchange.hf.text_config import text_config
from lowbit.measure.given_inputs import Given, resampled
from lowbit.measure.synthetic import RATE, image, sound, spectrum
from lowbit.measure.windows import Windows

_SEED = 0
_IMAGES, _SOUNDS, _TEXTS = 16, 8, 16  # made here
_TOKENS = 64  # of an input without a tokenizer


@dataclass(frozen=True, eq=False)
class Inputs:
    """`make[i]()` gives input i, tensors by the names of arguments; `words(count)` says what the first `count` of them are."""

    make: Sequence[Callable[[], dict[str, Tensor]]]
    words: Callable[[int], str]


def takes(model: nn.Module, name: str) -> bool:
    """Whether the forward of a model has an argument of that name."""
    return name in inspect.signature(model.forward).parameters


def inputs_of(
    model: nn.Module, windows: Windows | None, given: Given | None = None, folder: Path | None = None
) -> Inputs:
    """Inputs for a model of transformers.

    windows: of text, None where there is no tokenizer or the model takes no text. given: what the user gives in place of what is made
    here. folder: of the model's own files. SourceError where no input is known that it takes, TextError for inputs that are not for it.
    """
    main = getattr(model, "main_input_name", "input_ids")
    if given is not None and given.ready is not None:
        ready = given.ready
        return Inputs([partial(_ready, model, ready, i) for i in range(given.count)], given.first)
    makers = _makers(model, given, folder)
    if given is not None and not any(maker.uses for maker in makers.values()):
        kind = "images" if given.image is not None else "sounds"
        raise TextError(f"{given.name} has {kind}, and a {type(model).__name__} reads none; leave the inputs out")
    if main not in makers and main != "input_ids":
        raise SourceError(f"no input is known for {type(model).__name__}, which takes {main!r}")
    return _joined(model, windows, makers, given)


@dataclass(frozen=True, eq=False)
class _Maker:
    """make: what argument (and others that come with it) for input number i. uses: whether of what the user gave."""

    make: Callable[[int], dict[str, Tensor]]
    words: str
    count: int
    uses: bool


def _makers(model: nn.Module, given: Given | None, folder: Path | None) -> dict[str, _Maker]:
    own_image, own_sound = (None, None) if given is None else (given.image, given.sound)
    found: dict[str, _Maker] = {}
    if takes(model, "pixel_values"):
        count = given.count if given is not None and own_image is not None else _IMAGES
        found["pixel_values"] = _Maker(
            _images(model, own_image or image, folder), "synthetic image", count, own_image is not None
        )
    sounds = [name for name in ("input_features", "input_values") if takes(model, name)]
    if sounds:
        count = given.count if given is not None and own_sound is not None else _SOUNDS
        make = _sounds(model, sounds[0], own_sound, folder)
        found[sounds[0]] = _Maker(make, "synthetic sound", count, own_sound is not None)
    return found


def _joined(model: nn.Module, windows: Windows | None, makers: dict[str, _Maker], given: Given | None) -> Inputs:
    counts = [maker.count for maker in makers.values()]
    reads = takes(model, "input_ids")
    if reads and windows is not None:
        counts.append(windows.count)
    count = min(counts) if counts else _TEXTS
    config: Any = model.config
    starts = takes(model, "decoder_input_ids") and getattr(config, "is_encoder_decoder", False)

    def make(i: int) -> dict[str, Tensor]:
        one = {name: x for maker in makers.values() for name, x in maker.make(i).items()}
        if reads:
            one["input_ids"] = _random_ids(model, i) if windows is None else windows.ids[i][None]
        if starts:
            start = getattr(config, "decoder_start_token_id", None) or 0
            one["decoder_input_ids"] = one.get("input_ids", torch.tensor([[start]]))
        return one

    return Inputs([partial(make, i) for i in range(count)], partial(_words, reads, windows, makers, given))


def _words(reads: bool, windows: Windows | None, makers: dict[str, _Maker], given: Given | None, count: int) -> str:
    """What the first `count` inputs are."""
    plural = "s" * (count != 1)
    parts = []
    if reads:
        length = "" if windows is None else f" of {windows.length} tokens"
        parts.append(
            f"{count} input{plural} of random tokens" if windows is None else f"{count} window{plural}{length}"
        )
    if given is not None and any(maker.uses for maker in makers.values()):
        parts.append(given.first(count))
    parts += [f"{count} {maker.words}{plural}" for maker in makers.values() if not maker.uses]
    return " and ".join(parts)


def _random_ids(model: nn.Module, number: int) -> Tensor:
    config: Any = model.config
    text = text_config(config)
    length = min(_TOKENS, max_positions(model) or _TOKENS)
    generator = torch.Generator().manual_seed(_SEED + number)
    return torch.randint(int(text.vocab_size), (1, length), generator=generator)


def _images(
    model: nn.Module, source: Callable[[int], np.ndarray], folder: Path | None
) -> Callable[[int], dict[str, Tensor]]:
    config: Any = model.config
    part = getattr(config, "vision_config", None) or config
    size = getattr(part, "image_size", None) or 224
    height, width = (int(x) for x in (size if isinstance(size, (list, tuple)) else (size, size)))
    channels = int(getattr(part, "num_channels", None) or 3)
    processor = image_processor(folder)

    def make(i: int) -> dict[str, Tensor]:
        picture = source(i)
        if processor is not None:
            return {k: x for k, x in processed(processor, picture).items() if takes(model, k)}
        pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        shaped = nn.functional.interpolate(
            pixels, (height, width), mode="bilinear", antialias=True, align_corners=False
        )
        return {"pixel_values": shaped if channels == 3 else shaped.mean(1, keepdim=True).expand(1, channels, -1, -1)}

    return make


def _sounds(
    model: nn.Module, name: str, source: Callable[[int], tuple[np.ndarray, int]] | None, folder: Path | None
) -> Callable[[int], dict[str, Tensor]]:
    config: Any = model.config
    extractor = feature_extractor(folder)
    if source is not None and extractor is None and name != "input_values":
        raise TextError(
            f"sounds become what a {type(model).__name__} reads by its preprocessor_config.json, which its folder lacks; add that file, or give "
            f"arrays of {name} (.npz)"
        )

    def make(i: int) -> dict[str, Tensor]:
        if extractor is None and name != "input_values":
            return {name: torch.from_numpy(_spectrum(config, i))[None]}
        rate = int(getattr(extractor, "sampling_rate", None) or RATE)
        values, own = (sound(i), RATE) if source is None else source(i)
        values = resampled(values, own, rate)
        if extractor is not None:
            return {k: x for k, x in processed(extractor, values, sampling_rate=rate).items() if takes(model, k)}
        return {name: torch.from_numpy((values - values.mean()) / (values.std() + 1e-7))[None]}

    return make


def _spectrum(config: Any, number: int) -> np.ndarray:
    bins = int(getattr(config, "num_mel_bins", None) or 80)
    frames = 2 * int(getattr(config, "max_source_positions", None) or 500)  # Whisper halves them first
    return spectrum(number, bins, frames)


def _ready(model: nn.Module, read: Callable[[int], dict[str, Tensor]], number: int) -> dict[str, Tensor]:
    return _fitted(model, read(number))


def _fitted(model: nn.Module, arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """Arrays of the user as a batch of one. TextError for names that the model does not take."""
    strange = sorted(name for name in arrays if not takes(model, name))
    if strange:
        known = ", ".join(list(inspect.signature(model.forward).parameters)[:8])
        raise TextError(f"a {type(model).__name__} takes no {strange[0]!r}; its arguments are {known} and others")
    return {name: x if x.dim() > 1 and len(x) == 1 else x[None] for name, x in arrays.items()}
