"""Engine: a model of the Llama family, its weights packed, run by the C++ decoder."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.engine.batch import CHUNK, Batch, Running, marks
from lowbit.engine.conversation import KeptConversation
from lowbit.engine.request import sampling_of, split, stop_strings, token_ids, whole_number
from lowbit.engine.results import Generated, OnText, Prompt, Sampling
from lowbit.engine.runner import Description, Lengths, Memory, Piece, Runner
from lowbit.engine.runtime_formats import ActivationFormat, CacheFormat
from lowbit.engine.shape import Shape
from lowbit.engine.text_stream import TokenText
from lowbit.engine.tokenizer import TextTokenizer
from lowbit.engine.weights import Weights
from lowbit.errors import EngineError


class Engine:
    """A model ready to generate. Make one with `Engine.open`.

    Several threads may use one engine; their forwards take turns. Ctrl-C (an error that a handler of signals raises in the
    main thread) ends a forward where it is, and leaves the engine as it was before.
    """

    def __init__(
        self,
        weights: Weights,
        tokenizer: TextTokenizer | None,
        eos: frozenset[int],
        activations: str | ActivationFormat = "exact",
        cache: str | CacheFormat = "int16",
        threads: int | None = None,
        isa: str = "",
    ) -> None:
        self._runner = Runner(weights, ActivationFormat.of(activations), CacheFormat.of(cache), threads, isa)
        self._tokenizer, self._eos = tokenizer, eos

    @staticmethod
    def open(
        model: str | Path | nn.Module,
        activations: str | ActivationFormat = "exact",
        cache: str | CacheFormat = "int16",
        threads: int | None = None,
        isa: str = "",
        tokenizer: Any = None,
    ) -> Engine:
        """An engine for a folder that lowbit wrote, a float model by any name that lowbit takes, or a live model.

        activations: "exact" rounds them to 15 bits, which is as good as not at all; "int8" is faster. Weights whose
        recipe says how their inputs are rounded get that in either case. cache: how keys and values are stored, "int16"
        or "int8" (see `CacheFormat`), with a scale for each position and head; int16 is finer than float16.
        threads: all cores when None. isa: a set of kernels (see `lowbit doctor`), the best when empty. tokenizer: of
        transformers, in place of the model's own.

        EngineError with the reason for a model that the engine does not compute; transformers does.
        """
        from lowbit.engine.opening import opened

        activations, cache = ActivationFormat.of(activations), CacheFormat.of(cache)  # before anything large is read
        weights, words, eos = opened(model, tokenizer)
        return Engine(weights, words, eos, activations, cache, threads, isa)

    @property
    def shape(self) -> Shape:
        """The numbers of the model."""
        return self._runner.shape

    @property
    def tokenizer(self) -> TextTokenizer:
        """The model's tokenizer. EngineError when it came without one."""
        if self._tokenizer is None:
            raise EngineError("this model came without a tokenizer; give token ids, or tokenizer=... when opening")
        return self._tokenizer

    def __str__(self) -> str:
        return str(self.describe())

    def describe(self) -> Description:
        """How the engine runs and what it takes."""
        return self._runner.describe()

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
        whole_number("batch", batch, 1)
        alone, every = split(prompts)
        how = sampling_of(sampling)
        running = [self.running(i, self._ids(p, raw), max_new_tokens, stop, how) for i, p in enumerate(every)]
        if running:
            for sequence, text in self.run(running, how, self._memory_of(running, batch)):
                if stream is not None and text:
                    stream(text, sequence.index)
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
        alone, every = split(prompt)
        if not alone:
            raise EngineError(f"a list of {len(every)} prompts; stream answers one, generate(..., stream=...) several")
        how = sampling_of(sampling)
        running = self.running(0, self._ids(every[0], raw), max_new_tokens, stop, how)
        memory = self._memory_of([running], 1)  # what is wrong is said here, not at the first text

        def texts() -> Generator[str, None, Generated]:
            yield from (text for _, text in self.run([running], how, memory) if text)
            return running.result()

        return texts()

    def logits(self, ids: Sequence[int] | Tensor, chunk: int = CHUNK) -> Tensor:
        """float32 [n, vocabulary]: the logits after each of n tokens, read in chunks."""
        whole_number("chunk", chunk, 1)
        given = token_ids(ids, None, True, self.shape.vocabulary)
        memory = self.memory(1, len(given))
        rows: Any = np.empty((len(given), self.shape.vocabulary), dtype=np.float32)
        for first in range(0, len(given), chunk):
            part = given[first : first + chunk]
            here = rows[first : first + len(part)]
            self._runner.forward_tokens(memory, [(0, part, first)], range(len(part)), here, [len(given)])
        return torch.from_numpy(rows)

    def memory(self, sequences: int, positions: int) -> Memory:
        """Memory for keys and values of `sequences` of at most `positions` tokens. EngineError where they cannot be had."""
        return self._runner.memory(sequences, positions)

    def forward(self, memory: Memory, pieces: Sequence[Piece], wanted: Sequence[int], lengths: Lengths = None) -> Any:
        """float32 [len(wanted), vocabulary]: the logits after the last token of the pieces that are wanted, by index.

        pieces: (place in the memory, token ids, position of the first), one for each sequence; positions go on from what
        the memory holds of that place. lengths: how long the text of each piece is, its end where None: with LongRoPE a text
        that grows beyond the original positions is to be read again from its first token. The result stands until the next
        forward with this memory; copy what is to last.
        """
        return self._runner.forward(memory, pieces, wanted, lengths)

    def conversation(self, system: str | None = None, **sampling: Any) -> KeptConversation:
        """A conversation with this model. system: what it is told first; the rest are the fields of `Sampling`."""
        return KeptConversation(self, system, sampling_of(sampling))

    def run(
        self, sequences: Sequence[Running], sampling: Sampling, memory: Memory, ends: Container[int] | None = None
    ) -> Iterator[tuple[Running, str]]:
        """(sequence, new text) as it comes, until each has a reason to end; new ones and such as have keys and values in `memory`.

        ends: tokens that end a text, the model's own when None.
        """
        ends = self._eos if ends is None else ends
        return Batch(self._runner.core, self.forward, memory, sampling, ends, self.shape.is_long).run(sequences)

    def running(
        self,
        index: int,
        ids: Sequence[int],
        limit: int,
        stop: str | Sequence[str],
        sampling: Sampling,
        text: bool = True,
    ) -> Running:
        """A sequence that has not begun. text: whether its tokens become text, where there is a tokenizer."""
        limit, strings = whole_number("max_new_tokens", limit, 1), stop_strings(stop)
        words = self._tokenizer if text else None
        decode: Callable[[Sequence[int]], str] = (lambda ids: "") if words is None else words.decode
        if strings and words is None:
            self.tokenizer  # noqa: B018  raises: stop strings are of text
        return Running(
            index, list(ids), TokenText(decode, strings), limit, self._runner.core.Random((sampling.seed + index) % 2**64),
            marks(ids, self.shape.vocabulary) if sampling.repetition_penalty != 1 else None,
        )  # fmt: skip

    def _ids(self, prompt: Any, raw: bool) -> list[int]:
        return token_ids(prompt, self._tokenizer, raw, self.shape.vocabulary)

    def _memory_of(self, running: Sequence[Running], batch: int) -> Memory:
        return self.memory(min(batch, len(running)), max(len(r.ids) + r.limit for r in running))
