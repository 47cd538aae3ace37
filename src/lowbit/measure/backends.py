"""Programs with a model, measured in interleaved rounds: the engine and transformers. Each gives the same figures by the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lowbit.engine.engine import Engine
from lowbit.errors import SourceError
from lowbit.interchange.hf.running import max_positions
from lowbit.measure.interleave import Probe, SpeedSettings, Times, rate_probes
from lowbit.measure.size import module_bytes
from lowbit.measure.startup import Startup, startup
from lowbit.measure.token_times import engine_times, greedy_times


@dataclass(frozen=True, eq=False)
class Backend:
    """A program with a model.

    probes: its measurements by name, given the settings. weight_bytes: what a token must read of the weights. products:
    multiply-adds with weights, for the tokens of a prompt whose last one gives logits. Both None where not known.
    positions: the longest sequence. first: loads the model in a fresh process up to its first token, where it can.
    threads: of a pool of its own. fixed: the only settings that it measures with. close: called when all is measured.
    """

    name: str
    probes: Callable[[SpeedSettings], Mapping[str, Probe]]
    weight_bytes: int | None = None
    products: Callable[[int], int] | None = None
    positions: int | None = None
    first: Callable[[], Startup] | None = None
    note: str = ""
    threads: int | None = None
    startups: list[Startup] = field(default_factory=list)
    fixed: SpeedSettings | None = None
    close: Callable[[], None] = lambda: None

    def all_probes(self, settings: SpeedSettings) -> dict[str, Probe]:
        """The measurements, "first_token" in seconds among them where it can be taken."""
        first = self.first

        def first_token() -> float:
            assert first is not None
            self.startups.append(first())
            return self.startups[-1].seconds

        return {**self.probes(settings), **({} if first is None else {"first_token": first_token})}


def of_engine(engine: Engine, name: str, open_again: Mapping[str, Any] | None = None) -> Backend:
    """An engine. open_again: the arguments of `Engine.open`, as JSON, that make it in another process."""
    shape, facts = engine.shape, engine.describe()
    return Backend(
        name, _rates(times_of_engine(engine)), facts.bytes_per_token, lambda n: shape.products(n, 1), shape.positions,
        None if open_again is None else lambda: startup("engine", open_again), threads=facts.threads,
    )  # fmt: skip


def times_of_engine(engine: Engine) -> Times:
    """How long greedy generation takes a model in the engine."""
    vocabulary = engine.shape.vocabulary

    def times(sequences: int, prompt: int, new: int) -> list[float]:
        return engine_times(engine, some_ids(prompt, vocabulary), sequences, new)

    return times


def of_module(model: nn.Module, name: str, open_again: Mapping[str, Any] | None = None, note: str = "") -> Backend:
    """A model in transformers. SourceError for one that generates no text."""
    if not getattr(model, "can_generate", lambda: False)():
        raise SourceError(f"{name}: a {type(model).__name__} does not generate text; name a causal or seq2seq model")
    return Backend(
        name, _rates(module_times(model)), _read_by_module(model), None, max_positions(model),
        None if open_again is None else lambda: startup("transformers", open_again), note,
    )  # fmt: skip


def module_times(model: nn.Module) -> Times:
    """How long greedy generation takes a model in transformers."""
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]

    def times(sequences: int, prompt: int, new: int) -> list[float]:
        ids = torch.tensor(some_ids(prompt, vocabulary))[None].expand(sequences, -1)
        return greedy_times(model, ids, new)

    return times


def in_transformers(model: nn.Module, open_again: Mapping[str, Any] | None = None, note: str = "") -> Backend:
    """`of_module`, by the name of the type that it computes in, such as "transformers, float32"."""
    if not getattr(model, "can_generate", bool)():
        raise SourceError(f"a {type(model).__name__} does not generate text")
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return of_module(model, f"transformers, {str(own).removeprefix('torch.')}", open_again, note)


def some_ids(count: int, vocabulary: int) -> list[int]:
    """Token ids that look like no text in particular."""
    return [(i * 37 + 11) % min(vocabulary, 1000) for i in range(count)]


def _rates(times: Times) -> Callable[[SpeedSettings], Mapping[str, Probe]]:
    return lambda settings: rate_probes(times, settings)


def _read_by_module(model: nn.Module) -> int | None:
    """Bytes of weights that a token reads: all of a decoder, but an embedding that is not the head as well.

    None for a model that does not say which they are.
    """
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return None
    try:
        table = model.get_input_embeddings().weight  # type: ignore[operator]
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    tied = head is not None and head.weight is table
    return module_bytes(model) - (0 if tied else sum(t.nbytes for t in _tensors(table)))


def _tensors(weight: Any) -> list[torch.Tensor]:
    return [*weight.buffers()] if isinstance(weight, nn.Module) else [weight]
