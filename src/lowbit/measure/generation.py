"""Greedy generation of a forced length, by transformers or by the engine, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.engine.engine import Engine
from lowbit.interchange.hf.running import device_of, evaluating


def engine_times(engine: Engine, ids: Sequence[int], sequences: int, new: int) -> list[float]:
    """As `greedy_times`, of `sequences` times the same prompt `ids`, by the engine."""
    found = list[float]()
    start = time.perf_counter()
    memory = engine.memory(sequences, len(ids) + new)
    logits = engine.forward(memory, [(i, ids, 0) for i in range(sequences)], range(sequences))
    while True:
        tokens = logits.argmax(-1)
        found.append(time.perf_counter() - start)
        if len(found) == new:
            return found
        pieces = [(i, [int(tokens[i])], len(ids) + len(found) - 1) for i in range(sequences)]
        logits = engine.forward(memory, pieces, range(sequences))


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


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """So many threads for PyTorch meanwhile; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
