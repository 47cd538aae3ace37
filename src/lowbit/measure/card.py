"""The card: everything that was measured on one quantized model, as one value.

A part that was not measured is None. JSON holds no NaN or infinity, so those are written as text.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from lowbit.display import Displayed
from lowbit.errors import SourceError
from lowbit.measure.environment import Environment
from lowbit.measure.outputs import Outputs
from lowbit.measure.quality import Quality
from lowbit.measure.sample import Sample
from lowbit.measure.size import bits_per_weight
from lowbit.measure.speed import Speed
from lowbit.measure.windows import Windows
from lowbit.planning.cache_words import CacheFacts

T = TypeVar("T")


@dataclass(frozen=True)
class Coverage:
    """How many parameters were quantized, of how many, and what was kept and why, a line each."""

    quantized: int
    total: int
    kept: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        return self.quantized / self.total if self.total else 0.0


@dataclass(frozen=True)
class CardParts:
    """What is known about a quantized model before it runs.

    Bytes are on disk: `bytes_before` and `bytes_after` of everything needed to run, `weight_bytes` of
    the weight files after quantizing. `linear_bits` is bits per weight in the linear layers, scales and
    offsets included. `quantize_peak` is the peak resident bytes while quantizing. `calibrated`: whether text was looked at
    while quantizing; None where that is not known. `embed_bits`: bits per weight of embeddings and output heads.
    `cache`: how the folder says that the KV cache is stored, None where it says nothing.
    """

    model: str
    recipe: str
    parameters: int | None = None
    coverage: Coverage | None = None
    bytes_before: int | None = None
    bytes_after: int | None = None
    weight_bytes: int | None = None
    linear_bits: float | None = None
    quantize_seconds: float | None = None
    quantize_peak: int | None = None
    notes: tuple[str, ...] = ()
    calibrated: bool | None = None
    embed_bits: float | None = None
    cache: CacheFacts | None = None

    @property
    def bits(self) -> float | None:
        """Bits per weight of the weight files, headers included; of everything needed to run when only that is known."""
        nbytes = self.weight_bytes if self.weight_bytes is not None else self.bytes_after
        if nbytes is None or not self.parameters:
            return None
        return bits_per_weight(nbytes, self.parameters)


@dataclass(frozen=True)
class TextMark:
    """Which text was measured on, and how it was cut."""

    name: str
    sha256: str
    windows: int
    length: int
    notes: tuple[str, ...] = ()

    @staticmethod
    def of(windows: Windows) -> TextMark:
        return TextMark(windows.text_name, windows.text_sha256, windows.count, windows.length, windows.notes)


@dataclass(frozen=True, repr=False)
class Card(Displayed):
    """All parts together. `run_peak` is the peak resident bytes of a fresh process that ran the model.

    `outputs` in place of `quality` for a model that predicts no tokens; `unmeasured`: why there is neither. `budget`: the seconds that
    measuring was given; None where it took as long as what was asked for takes.
    """

    parts: CardParts
    text: TextMark | None = None
    quality: Quality | None = None
    speed: Speed | None = None
    run_peak: int | None = None
    sample: Sample | None = None
    environment: Environment | None = None
    outputs: Outputs | None = None
    unmeasured: str | None = None
    budget: float | None = None

    def _brief(self) -> str:
        return f"{self.parts.model}, {self.parts.recipe}"

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, numbers and strings. Bits per weight and speed ratios come along."""
        data = json_ready(dataclasses.asdict(self))
        data["parts"]["bits"] = self.parts.bits
        if self.speed is not None and self.speed.model is not None:
            names = ("decode", "prefill", "batch")
            data["speed"]["ratios"] = {name: self.speed.ratio(name) for name in names}
        return data

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str) -> Card:
        """The card that `to_json` wrote. Raises SourceError for anything else."""
        try:
            return _build(Card, json.loads(text))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise SourceError(f"this is not the JSON of a card ({error}): measure the model again") from None


def json_ready(value: Any) -> Any:
    """`value` with tuples as lists and NaN or infinity as text, which JSON numbers cannot be."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value


def _build(kind: Any, value: Any) -> Any:
    """`value` from JSON as the annotated type `kind`: dataclasses, tuples, optionals and scalars."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = {f.name for f in dataclasses.fields(kind)}
        return kind(**{key: _build(hints[key], item) for key, item in value.items() if key in known})  # type: ignore[operator]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(each for each in arguments if each is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is not a list")
        return tuple(_build(arguments[0], item) for item in value)
    if kind is float:
        return float(value)
    if not isinstance(value, kind):
        raise TypeError(f"{value!r} is not of type {kind.__name__}")
    return value
