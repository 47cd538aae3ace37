"""Greedy generation of a forced length, by transformers or by the engine, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.engine.engine import Engine
from lowbit.engine.generation import Sampling
from lowbit.engine.transformers_loop import generate_tokens
from lowbit.interchange.hf.running import device_of, evaluating


def engine_times(engine: Engine, ids: Sequence[int], sequences: int, new: int) -> list[float]:
    """As `greedy_times`, of `sequences` times the same prompt `ids`, by the engine."""
    how, times = Sampling(), [0.0] * new
    start = time.perf_counter()
    running = [engine.running(i, ids, new, (), how, text=False) for i in range(sequences)]
    for sequence, _ in engine.run(running, how, engine.kv_cache(sequences, len(ids) + new), ends=()):
        times[sequence.generated - 1] = sequence.last - start  # that of the last sequence stays
    return times


def greedy_times(model: nn.Module, ids: Tensor, new: int) -> list[float]:
    """Greedy generation of exactly `new` tokens after ids [batch, length]; seconds until each of them."""
    from transformers import GenerationConfig

    device = device_of(model)
    ids, times = ids.to(device), list[float]()

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def on_tokens(_: Tensor) -> bool:
        times.append(now() - start)
        return False

    config = GenerationConfig(do_sample=False, num_beams=1, max_new_tokens=new, use_cache=True)
    with evaluating(model), _plain_generation(model):
        start = now()
        generate_tokens(model, ids, on_tokens, generation_config=config)
    return times


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
