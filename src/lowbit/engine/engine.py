"""Engine: a model of the Llama family, its weights packed, run by the C++ decoder."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.engine.batch import CHUNK, Batch, Running, marks
from lowbit.engine.build import ACTIVATIONS, Builder, Program
from lowbit.engine.conversation import KeptConversation
from lowbit.engine.results import Generated, OnText, Prompt, Sampling
from lowbit.engine.shape import Shape, shape_of
from lowbit.engine.text import TokenText
from lowbit.engine.tokenizer import TextTokenizer
from lowbit.engine.weights import Weights
from lowbit.errors import EngineError, RecipeError, nearest
from lowbit.kernels.core import core, why_absent

CACHES = ("fp16", "int8")


@dataclass(frozen=True, eq=False)
class Memory:
    """Keys and values of some sequences, and the decoder for sequences of their length."""

    decoder: Any
    cache: Any
    positions: int

    @property
    def sequences(self) -> int:
        return int(self.cache.sequences)


@dataclass(frozen=True)
class Description:
    """Of an engine: how it runs and what it takes.

    packed_bytes: of all weights; bytes_per_token: of those that one token reads, which are all but an embedding that is
    not the head as well. cache_bytes_per_token: what its keys and values add. expanded: weights that no kernel holds packed, with the reason; they are float16. rounded: weights whose levels had
    to be rounded to fit a table, which only happens with activations "int8".
    """

    family: str
    isa: str
    threads: int
    activations: str
    cache: str
    packed_bytes: int
    bytes_per_token: int
    cache_bytes_per_token: int
    positions: int
    expanded: dict[str, str] = field(default_factory=dict)
    rounded: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"engine ({self.isa}, {self.threads} thread{'s' * (self.threads != 1)})"


class Engine:
    """A model ready to generate. Make one with `Engine.open`.

    Several threads may use one engine; their forwards take turns.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: TextTokenizer | None,
        eos: frozenset[int],
        activations: str = "exact",
        cache: str = "fp16",
        threads: int | None = None,
        isa: str = "",
    ) -> None:
        _known("activations", activations, ACTIVATIONS)
        _known("cache", cache, CACHES)
        module = core()
        if module is None:
            raise EngineError(f"the engine needs the C++ part of lowbit, which is not there: {why_absent()}")
        if isa:
            _known("isa", isa, tuple(module.isas()))
        if threads is not None and threads < 1:
            raise RecipeError(f"threads={threads}; give 1 or more, or nothing for all cores")
        self._core: Any = module
        self._isa, self._activations, self._cache = isa or module.isas()[0], activations, cache
        self._pool = self._core.Pool(threads or module.features()["cores"])
        self._config = weights.config
        self._shape = shape_of(weights.config)
        with _one_torch_thread():
            self._program = Builder(module, self._shape, weights, activations).build()
        self._decoders: dict[bool, Any] = {}
        self._lock = Lock()
        self._tokenizer, self._eos = tokenizer, eos

    @staticmethod
    def open(
        model: str | Path | nn.Module,
        activations: str = "exact",
        cache: str = "fp16",
        threads: int | None = None,
        isa: str = "",
        tokenizer: Any = None,
    ) -> Engine:
        """An engine for a folder that lowbit wrote, a float model by any name that lowbit takes, or a live model.

        activations: "exact" rounds them to 15 bits, which is as good as not at all; "int8" is faster. Weights whose
        recipe says how their inputs are rounded get that in either case. cache: keys and values as "fp16" or "int8".
        threads: all cores when None. isa: a set of kernels (see `lowbit doctor`), the best when empty. tokenizer: of
        transformers, in place of the model's own.

        EngineError with the reason for a model that the engine does not compute; transformers does.
        """
        from lowbit.engine.opening import opened

        weights, words, eos = opened(model, tokenizer)
        return Engine(weights, words, eos, activations, cache, threads, isa)

    @property
    def shape(self) -> Shape:
        """The numbers of the model."""
        return self._shape

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer. EngineError when it came without one."""
        if self._tokenizer is None:
            raise EngineError("this model came without a tokenizer; give token ids, or tokenizer=... when opening")
        return self._tokenizer

    def describe(self) -> Description:
        """How the engine runs and what it takes."""
        program: Program = self._program
        per_token = self._core.Cache(self._decoder(1), 1, 1, self._cache == "int8").bytes_per_position
        return Description(
            str(self._config["model_type"]), self._isa, self._pool.threads, self._activations, self._cache,
            program.nbytes, program.nbytes - program.lookup_bytes, per_token, self._shape.positions, dict(program.expanded), list(program.rounded),
        )  # fmt: skip

    @overload
    def generate(self, prompts: str, *, max_new_tokens: int = ..., stop: str | Sequence[str] = ..., raw: bool = ..., stream: OnText | None = ..., batch: int = ..., **sampling: Any) -> Generated: ...  # fmt: skip
    @overload
    def generate(self, prompts: Any, *, max_new_tokens: int = ..., stop: str | Sequence[str] = ..., raw: bool = ..., stream: OnText | None = ..., batch: int = ..., **sampling: Any) -> Any: ...  # fmt: skip
    def generate(
        self,
        prompts: Any,
        *,
        max_new_tokens: int = 200,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        stream: OnText | None = None,
        batch: int = 32,
        **sampling: Any,
    ) -> Any:
        """Answer one prompt, or each of a list of them.

        prompts: text, which goes into the chat template where the model has one and `raw` is not asked for, or token
        ids, which are taken as they are. stop: strings that end an answer. stream: called with (piece, index) as text
        comes. batch: how many prompts run side by side. The rest are the fields of `Sampling`: temperature, top_k, top_p,
        min_p, repetition_penalty, seed. A sequence gets the same tokens whatever runs beside it.

        One `Generated` for one prompt, a list of them for a list. EngineError for a prompt that does not fit.
        """
        alone, ids = self._prompts(prompts, raw)
        running = self._start(ids, max_new_tokens, stop, sampling_of(sampling))
        for sequence, piece in self._run(running, sampling_of(sampling), batch):
            if stream is not None and piece:
                stream(piece, sequence.index)
        results = [sequence.result() for sequence in running]
        return results[0] if alone else results

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 200,
        stop: str | Sequence[str] = (),
        raw: bool = False,
        **sampling: Any,
    ) -> Generator[str, None, Generated]:
        """The answer to one prompt, piece by piece as it comes; the generator returns the `Generated`."""
        _, ids = self._prompts(prompt, raw)
        running = self._start(ids[:1], max_new_tokens, stop, sampling_of(sampling))
        for _, piece in self._run(running, sampling_of(sampling), 1):
            if piece:
                yield piece
        return running[0].result()

    def logits(self, ids: Sequence[int] | Tensor, chunk: int = CHUNK) -> Tensor:
        """float32 [n, vocabulary]: the logits after each of n tokens, read in chunks."""
        given = self._checked(ids)
        memory = self.memory(1, len(given))
        rows: Any = np.empty((len(given), self._shape.vocabulary), dtype=np.float32)
        for first in range(0, len(given), chunk):
            part = given[first : first + chunk]
            self._forward_tokens(memory, [(0, part, first)], range(len(part)), rows[first : first + len(part)])
        return torch.from_numpy(rows)

    def memory(self, sequences: int, positions: int) -> Memory:
        """Memory for keys and values of `sequences` of at most `positions` tokens. EngineError where they cannot be had."""
        if positions > self._shape.positions:
            raise EngineError(
                f"{positions} tokens, and this model has {self._shape.positions} positions; shorten the prompt or max_new_tokens"
            )
        decoder = self._decoder(positions)
        try:
            return Memory(decoder, self._core.Cache(decoder, sequences, positions, self._cache == "int8"), positions)
        except MemoryError:
            raise EngineError(
                f"no memory for keys and values of {sequences} x {positions} tokens; lower max_new_tokens or batch, or use "
                "cache='int8'"
            ) from None

    def conversation(self, system: str | None = None, **sampling: Any) -> KeptConversation:
        """A conversation with this model. system: what it is told first; the rest are the fields of `Sampling`."""
        return KeptConversation(self, system, sampling_of(sampling))

    def continued(self, running: Running, memory: Memory, sampling: Sampling) -> Iterator[str]:
        """Go on with one sequence whose keys and values are in place 0 of `memory` up to `running.done`."""
        running.slot = 0
        for _, piece in Batch(self._core, self.forward, memory, sampling, self._eos).run([running]):
            if piece:
                yield piece

    def running(
        self, index: int, ids: Sequence[int], limit: int, stop: str | Sequence[str], sampling: Sampling
    ) -> Running:
        """A sequence that has not begun."""
        strings = [stop] if isinstance(stop, str) else list(stop)
        words = self._tokenizer
        decode: Callable[[Sequence[int]], str] = (lambda ids: "") if words is None else words.decode
        if strings and words is None:
            self.tokenizer  # noqa: B018  raises: stop strings are of text
        return Running(
            index, list(ids), TokenText(decode, strings), limit, self._core.Random(sampling.seed + index),
            marks(ids, self._shape.vocabulary) if sampling.repetition_penalty != 1 else None,
        )  # fmt: skip

    def _start(self, ids: list[list[int]], limit: int, stop: str | Sequence[str], sampling: Sampling) -> list[Running]:
        if limit < 1:
            raise RecipeError(f"max_new_tokens={limit}; ask for 1 or more")
        return [self.running(i, prompt, limit, stop, sampling) for i, prompt in enumerate(ids)]

    def _run(self, running: list[Running], sampling: Sampling, batch: int) -> Iterator[tuple[Running, str]]:
        if not running:
            return
        longest = max(len(r.ids) + r.limit for r in running)
        memory = self.memory(min(max(batch, 1), len(running)), longest)
        yield from Batch(self._core, self.forward, memory, sampling, self._eos).run(running)

    def _prompts(self, prompts: Any, raw: bool) -> tuple[bool, list[list[int]]]:
        """(whether it is one, their token ids)"""
        if isinstance(prompts, str):
            return True, [self._encoded(prompts, raw)]
        if isinstance(prompts, (Tensor, np.ndarray)):
            prompts = prompts.tolist()
        alone = len(prompts) > 0 and not isinstance(prompts[0], (str, list, tuple, Tensor, np.ndarray))
        every = [prompts] if alone else prompts
        return alone, [self._encoded(p, raw) if isinstance(p, str) else self._checked(p) for p in every]

    def _encoded(self, text: str, raw: bool) -> list[int]:
        ids = self.tokenizer.prompt(text, raw)
        if not ids:
            raise EngineError(f"the prompt {text!r} has no tokens; write a few words")
        return self._checked(ids)

    def _checked(self, ids: Any) -> list[int]:
        found = [int(i) for i in (ids.tolist() if hasattr(ids, "tolist") else ids)]
        if not found:
            raise EngineError("a prompt without tokens; give one or more")
        wrong = next((i for i in found if not 0 <= i < self._shape.vocabulary), None)
        if wrong is not None:
            raise EngineError(
                f"token {wrong} is outside of the vocabulary of {self._shape.vocabulary}; use the model's own tokenizer"
            )
        return found

    def _decoder(self, positions: int) -> Any:
        """The decoder for sequences up to `positions`. LongRoPE has other frequencies for long ones; weights are shared."""
        long = bool(self._shape.short_positions) and positions > self._shape.short_positions
        if long not in self._decoders:
            rotations = shape_of(self._config, positions).rotations
            self._decoders[long] = self._core.Decoder(self._program.with_rotations(rotations), self._pool, self._isa)
        return self._decoders[long]

    def forward(self, memory: Memory, pieces: Sequence[tuple[int, Sequence[int], int]], wanted: Sequence[int]) -> Any:
        """float32 [len(wanted), vocabulary]: the logits after the last token of the pieces that are wanted, by index.

        pieces: (place in the memory, token ids, position of the first), one for each sequence; positions go on from what
        the memory holds of that place.
        """
        ends = np.cumsum([len(ids) for _, ids, _ in pieces]) - 1
        rows: Any = np.empty((len(wanted), self._shape.vocabulary), dtype=np.float32)
        self._forward_tokens(memory, pieces, [int(ends[i]) for i in wanted], rows)
        return rows

    def _forward_tokens(self, memory: Memory, pieces: Any, wanted: Any, rows: Any) -> None:
        ids = np.concatenate([np.asarray(part, dtype=np.int32) for _, part, _ in pieces])
        place = np.concatenate([np.full(len(part), at, dtype=np.int32) for at, part, _ in pieces])
        position = np.concatenate([np.arange(first, first + len(part), dtype=np.int32) for _, part, first in pieces])
        with self._lock:
            memory.decoder.forward(memory.cache, ids, place, position, np.asarray(wanted, dtype=np.int32), rows)


def sampling_of(options: dict[str, Any]) -> Sampling:
    """The `Sampling` of these options. RecipeError for one that there is not."""
    fields = Sampling.__dataclass_fields__
    for name in options:
        if name not in fields:
            raise RecipeError(f"there is no option {name!r}{nearest(name, fields)} (known: {', '.join(fields)})")
    return Sampling(**options)


def _known(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise RecipeError(f"{what}={value!r}{nearest(value, known)} (known: {', '.join(known)})")


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """The engine has its own threads; PyTorch's would spin beside them after packing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
