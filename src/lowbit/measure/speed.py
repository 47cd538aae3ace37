"""Tokens per second, beside the base model in the same run.

Machines are noisy and slow down as they warm up, so the two models take turns, each figure is the
median of the turns, and the ratio is what to trust. Three figures:

- decode: greedy generation of one sequence, from its first new token to its last;
- prefill: tokens of the prompt per second until the first new token;
- batch: new tokens per second over several sequences at once, prompt included.

Generation is greedy and of a forced length, whatever the model's own generation settings say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import TextError
from ..interchange.running import device_of, evaluating, max_positions
from .quality import Progress
from .turns import SpeedSettings, Times, fit_settings, rate_probes, take_turns

_PROMPT = "The secret of life is"


STANDARD = SpeedSettings()
SHORT = SpeedSettings(new=32, batch=0)


@dataclass(frozen=True)
class Rates:
    """Tokens per second, each the median of the repeats; None when it could not be measured."""

    decode: float
    prefill: float
    batch: float | None = None


@dataclass(frozen=True)
class Speed:
    """Speed of a model, beside the base model, and the settings as they were after fitting the model.

    When the model cannot generate, `skipped` says why and the rest is None.
    """

    settings: SpeedSettings | None = None
    model: Rates | None = None
    base: Rates | None = None
    skipped: str | None = None

    def ratio(self, name: str) -> float | None:
        """How many times as fast as the base: `name` is decode, prefill or batch."""
        mine, other = getattr(self.model, name, None), getattr(self.base, name, None)
        return mine / other if mine and other else None


def measure_speed(
    model: nn.Module,
    tokenizer: Any,
    *,
    base: nn.Module | None = None,
    settings: SpeedSettings = STANDARD,
    progress: Progress | None = None,
) -> Speed:
    """Speed of `model`, taking turns with `base` when given. Lengths are cut to what the models take."""
    models = [model] if base is None else [base, model]
    for each in models:
        if not _can_generate(each):
            return Speed(skipped=f"{type(each).__name__} does not generate text")
    settings = fit_settings(settings, [max_positions(each) for each in models])
    prompt = _prompt_ids(tokenizer)
    probes = [rate_probes(_times(each, prompt), settings, len(prompt)) for each in models]
    rates = take_turns(probes, settings.repeats, progress)
    medians = [Rates(**{name: statistics.median(values) for name, values in found.items()}) for found in rates]
    return Speed(settings, medians[-1], medians[0] if base is not None else None)


def greedy_times(model: nn.Module, ids: Tensor, new: int) -> list[float]:
    """Greedy generation of exactly `new` tokens after ids [batch, length]; seconds until each of them."""
    from transformers import GenerationConfig

    device = device_of(model)
    ids = ids.to(device)
    clock = _Clock(device)
    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=new, use_cache=True)
    with evaluating(model), _plain_generation(model):
        clock.start()
        model.generate(  # type: ignore[operator]
            ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[clock]
        )
    return clock.times


class _Clock:
    """A stopping criterion that never stops and notes when it was asked: once per new token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin = 0.0
        self.times: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.begin = self.now()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.times.append(self.now() - self.begin)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@contextmanager
def _plain_generation(model: nn.Module) -> Iterator[None]:
    """Replace the model's own generation settings: no end token, no sampling, no penalties.

    transformers fills everything left open in a call from the model's settings, so only replacing
    them makes the work the same for all models.
    """
    from transformers import GenerationConfig

    own: Any = model.generation_config
    start = getattr(own, "decoder_start_token_id", None)
    if start is None:
        start = getattr(model.config, "decoder_start_token_id", None)
    plain = GenerationConfig(bos_token_id=own.bos_token_id, pad_token_id=0, decoder_start_token_id=start)
    model.generation_config = plain  # type: ignore[assignment]
    try:
        yield
    finally:
        model.generation_config = own


def _can_generate(model: nn.Module) -> bool:
    able = getattr(model, "can_generate", None)
    return callable(able) and callable(getattr(model, "generate", None)) and bool(able())


def _prompt_ids(tokenizer: Any) -> Tensor:
    ids = tokenizer(_PROMPT, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise TextError("the tokenizer makes no tokens of plain English, so speed cannot be measured")
    return torch.tensor(ids, dtype=torch.int64)


def _times(model: nn.Module, prompt: Tensor) -> Times:
    def times(sequences: int, length: int, new: int) -> list[float]:
        ids = prompt.repeat(-(-length // len(prompt)))[None, :length]
        return greedy_times(model, ids.expand(sequences, -1), new)

    return times
