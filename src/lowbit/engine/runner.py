"""Tokens in, logits out: the packed program of a model, the decoders that run it, and the KV cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import numpy as np
import torch

from lowbit.engine.arguments import one_of, whole_number
from lowbit.engine.build import Builder
from lowbit.engine.cache_layout import layers_of
from lowbit.engine.runtime_formats import ActivationFormat
from lowbit.engine.shape import shape_of
from lowbit.engine.weights import Weights
from lowbit.errors import EngineError
from lowbit.kernels.core import core, why_absent
from lowbit.kernels.heap import trim
from lowbit.kv import CacheFormat

MOST_THREADS = 1024

Chunk = tuple[int, Sequence[int], int]
"""Tokens of one sequence: its slot in the KV cache, their ids, the position of the first."""

Lengths = Sequence[int] | None
"""Of each chunk how long the text is that it belongs to; None where each ends with its chunk."""


@dataclass(eq=False)
class KVCache:
    """Keys and values of some sequences, each in a slot, and an array for their logits. core: what the C++ part has of it."""

    core: Any
    positions: int
    _logits: Any = None

    def logits(self, count: int, vocabulary: int) -> Any:
        """float32 [count, vocabulary] to write to, the same each time: new memory would cost as much as a layer."""
        if self._logits is None or len(self._logits) < count:
            self._logits = np.empty((count, vocabulary), dtype=np.float32)
        return self._logits[:count]

    @property
    def sequences(self) -> int:
        return int(self.core.sequences)

    def can_go_on(self, slot: int, position: int) -> bool:
        """Whether the text of a slot can be written anew from this position: what tokens there read exactly is still kept."""
        return bool(self.core.can_go_on(slot, position))


@dataclass(frozen=True)
class Description:
    """Of an engine: how it runs and what it takes.

    packed_bytes: of all weights; bytes_per_token: of those that one token reads, which are all but an embedding that is
    not the head as well and the experts that it does not take. cache_bytes_per_token: what its keys and values add;
    cache_exact_bytes: what a sequence keeps exactly beside these, in the formats that have such tokens. expanded: weights that no kernel holds
    packed, with the reason; they are float16. rounded: weights whose levels had to be rounded to fit a table, which only
    happens with activations "int8".
    """

    family: str
    isa: str
    threads: int
    activations: str
    cache: str
    packed_bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int
    cache_exact_bytes: int
    positions: int
    expanded: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"engine ({self.isa}, {self.threads} thread{'s' * (self.threads != 1)})"


class _Process:
    """What a forward changes: the threads, the decoders that they run, and the lock that one forward at a time has.

    A process has its own. A child of fork() has none of its parent's threads, and everything else as it was in the middle of what
    another thread did: a lock that nobody will open, memory half moved. Weights never change, so they are shared.
    """

    def __init__(self, core: Any, threads: int) -> None:
        self.pool, self.lock = core.ThreadPool(threads), Lock()
        self.decoders: dict[bool, Any] = {}


class Runner:
    """Runs the decoder of one model. Several threads may use it; their forwards run one after another.

    In a child of a process that forked it goes on with threads of its own.
    """

    def __init__(
        self, weights: Weights, activations: ActivationFormat, cache: CacheFormat, threads: int | None, isa: str
    ) -> None:
        module = core()
        if module is None:
            raise EngineError(f"the engine needs the C++ part of lowbit, which is not there: {why_absent()}")
        if isa:
            one_of("isa", isa, tuple(module.isas()))
        if threads is not None:
            whole_number("threads", threads, 1, MOST_THREADS)
        self.core: Any = module
        self.shape = shape_of(weights.config)
        self._config, self._isa = weights.config, isa or module.isas()[0]
        self._activations, self._cache = activations, cache
        self._layers = layers_of(module, cache, self.shape.layers, self.shape.head_dim)
        self._threads = threads or int(module.features()["cores"])
        self._processes = {os.getpid(): _Process(module, self._threads)}
        with _one_torch_thread():
            self._program = Builder(module, self.shape, weights, str(activations)).build(self._threads)
        trim()  # packing went through every weight unpacked

    def describe(self) -> Description:
        """How it runs and what it takes."""
        program = self._program
        one = self._new_cache(1, min(self.shape.positions, 1 << 11))
        return Description(
            str(self._config["model_type"]), self._isa, self._threads, str(self._activations), str(self._cache),
            program.nbytes, program.nbytes - program.lookup_bytes - program.idle_bytes, one.bytes_per_position, one.exact_bytes,
            self.shape.positions,
            dict(program.expanded), list(program.rounded),
        )  # fmt: skip

    def kv_cache(self, sequences: int, positions: int) -> KVCache:
        """For keys and values of `sequences` of at most `positions` tokens. EngineError where they cannot be had."""
        whole_number("sequences", sequences, 1)
        whole_number("positions", positions, 1)
        if positions > self.shape.positions:
            raise EngineError(
                f"{positions} tokens, and this model has {self.shape.positions} positions; shorten the prompt or max_new_tokens"
            )
        try:
            return KVCache(self._new_cache(sequences, positions), positions)
        except MemoryError:
            raise EngineError(
                f"no memory for keys and values of {sequences} x {positions} tokens; lower max_new_tokens or batch, or use "
                "cache='int8' or cache='int4:g32'"
            ) from None

    def forward(self, cache: KVCache, chunks: Sequence[Chunk], wanted: Sequence[int], lengths: Lengths = None) -> Any:
        """float32 [len(wanted), vocabulary]: the logits after the last token of the chunks that are wanted, by index.

        They stand until the next forward with this cache.
        """
        ends = np.cumsum([len(ids) for _, ids, _ in chunks]) - 1
        rows = cache.logits(len(wanted), self.shape.vocabulary)
        self.forward_tokens(cache, chunks, [int(ends[i]) for i in wanted], rows, lengths)
        return rows

    def forward_tokens(
        self, cache: KVCache, chunks: Sequence[Chunk], wanted: Sequence[int], rows: Any, lengths: Lengths = None
    ) -> None:
        """The same after any token of the chunks, counted through, into `rows` float32 [len(wanted), vocabulary]."""
        lengths = [first + len(ids) for _, ids, first in chunks] if lengths is None else lengths
        most = max(len(ids) for _, ids, _ in chunks)
        piece = cache.core.piece or most
        starts = np.cumsum([0, *(len(ids) for _, ids, _ in chunks)])
        for begin in range(
            0, most, piece
        ):  # a cache that keeps the newest tokens exactly takes so many of a text at a time
            here = [i for i, (_, ids, _) in enumerate(chunks) if len(ids) > begin]
            parts = [
                (slot, ids[begin : begin + piece], first + begin) for slot, ids, first in (chunks[i] for i in here)
            ]
            tokens: Any = np.concatenate(
                [starts[i] + begin + np.arange(len(p[1])) for i, p in zip(here, parts, strict=True)]
            )
            asked = (
                [i for i, token in enumerate(wanted) if token in tokens] if piece < most else list(range(len(wanted)))
            )
            at = np.searchsorted(tokens, [wanted[i] for i in asked])
            self._forward_piece(cache, parts, at, rows, asked, [lengths[i] for i in here])

    def _forward_piece(
        self, cache: KVCache, chunks: Sequence[Chunk], wanted: Any, rows: Any, at: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Logits of the tokens `wanted` of these chunks into the rows `at`."""
        owners: Any = np.repeat(np.arange(len(chunks)), [len(ids) for _, ids, _ in chunks])
        for long in (False, True):
            chosen = [i for i, length in enumerate(lengths) if self.shape.is_long(length) == long]
            if len(chosen) == len(chunks) and len(at) == len(rows):
                self._run(long, cache, chunks, wanted, rows)
            elif chosen:
                tokens = np.flatnonzero(np.isin(owners, chosen))
                here = [i for i, token in enumerate(wanted) if owners[token] in chosen]
                part: Any = np.empty((len(here), rows.shape[1]), dtype=np.float32)
                ours = np.searchsorted(tokens, [wanted[i] for i in here])
                self._run(long, cache, [chunks[i] for i in chosen], ours, part)
                rows[[at[i] for i in here]] = part

    def _run(self, long: bool, cache: KVCache, chunks: Sequence[Chunk], wanted: Any, rows: Any) -> None:
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for _, part, _ in chunks])
        slot = np.concatenate([np.full(len(part), at, dtype=np.int32) for at, part, _ in chunks])
        position = np.concatenate([np.arange(first, first + len(part), dtype=np.int32) for _, part, first in chunks])
        with self._process().lock:
            decoder = self._decoder(self.shape.short_positions + 1 if long else 1)
            try:
                decoder.forward(cache.core, ids, slot, position, np.asarray(wanted, dtype=np.int32), rows)
            except MemoryError:
                raise EngineError(
                    f"no memory to run {len(ids)} tokens, or for keys and values that int8 does not hold; lower batch or "
                    "max_new_tokens"
                ) from None

    def _new_cache(self, sequences: int, positions: int) -> Any:
        return self.core.KVCache(self._decoder(1), sequences, positions, self._layers)

    def _process(self) -> _Process:
        """This process's own; the others' are kept, as they cannot be taken apart here."""
        found = self._processes.get(os.getpid())
        return found or self._processes.setdefault(os.getpid(), _Process(self.core, self._threads))

    def _decoder(self, positions: int) -> Any:
        """The decoder for texts of `positions`. LongRoPE has other frequencies for long ones; weights are shared."""
        long, process = self.shape.is_long(positions), self._process()
        if long not in process.decoders:
            ropes = [
                self.core.RopeSpec(inverse_frequency=r.inverse_frequency, factor=r.factor, interleaved=r.interleaved)
                for r in shape_of(self._config, positions).rotations
            ]
            process.decoders[long] = self.core.Decoder(self._program.model, ropes, process.pool, self._isa)
        return process.decoders[long]


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The engine has its own threads; PyTorch's would go on spinning after packing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
