"""Engine: a decoder of one of the families in `families/`, its weights packed, run by the C++ core."""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.engine.arguments import sampling_of, split_prompts, stop_strings, token_ids, whole_number
from lowbit.engine.batch import CHUNK, Batch, Running, marks
from lowbit.engine.cache_layout import checked
from lowbit.engine.conversation import CachedConversation
from lowbit.engine.detokenizer import AnswerText
from lowbit.engine.generation import Generated, OnText, Prompt, Sampling
from lowbit.engine.runner import Chunk, Description, KVCache, Lengths, Runner
from lowbit.engine.runtime_formats import ActivationFormat
from lowbit.engine.shape import Shape
from lowbit.engine.tokenizer import TextTokenizer
from lowbit.engine.weights import Weights
from lowbit.errors import EngineError
from lowbit.interchange.source import Source
from lowbit.kv import CacheFormat


class Engine:
    """A model ready to generate. Make one with `Engine.open`.

    Several threads may use one engine; their forwards run one after another. Ctrl-C (an error that a handler of signals raises in the
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
        self._runner = Runner(weights, ActivationFormat.of(activations), checked(cache), threads, isa)
        self._tokenizer, self._eos = tokenizer, eos

    @staticmethod
    def open(
        model: str | Path | nn.Module | Source,
        activations: str | ActivationFormat = "exact",
        cache: str | CacheFormat | None = None,
        threads: int | None = None,
        isa: str = "",
        tokenizer: Any = None,
    ) -> Engine:
        """An engine for a folder that lowbit wrote, a float model by any name that lowbit takes or opened already, or a live model.

        activations: "exact" rounds them to 15 bits, which is as good as not at all; "int8" is faster. Weights whose
        recipe says how their inputs are rounded get that in either case. cache: how keys and values are stored: "int16", which is
        finer than float16, or any `lowbit.kv.CacheFormat` that the engine computes, such as "int8", "int4:g32" or "kivi2"; None
        for what the folder carries, and int16 where it carries none.
        threads: all cores when None. isa: a set of kernels (see `lowbit doctor`), the best when empty. tokenizer: of
        transformers, in place of the model's own.

        EngineError with the reason for a model that the engine does not compute; transformers does. RecipeError for a cache format
        that it does not compute, with the nearest that it does.
        """
        from lowbit.engine.folder_cache import wanted
        from lowbit.engine.opening import opened

        # before anything large is read
        activations, cache = ActivationFormat.of(activations), checked(wanted(model, cache))
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
        ids, which are taken as they are. stop: strings that end an answer. stream: called with (text, index) as it
        comes. batch: how many prompts run side by side. The others are the fields of `Sampling`: temperature, top_k, top_p,
        min_p, repetition_penalty, seed. A sequence gets the same tokens whatever else is in the batch.

        One `Generated` for one prompt, a list of them for a list. EngineError for a prompt that does not fit.
        """
        whole_number("batch", batch, 1)
        alone, every = split_prompts(prompts)
        how = sampling_of(sampling)
        running = [self.running(i, self._ids(p, raw), max_new_tokens, stop, how) for i, p in enumerate(every)]
        if running:
            for sequence, text in self.run(running, how, self._cache_of(running, batch)):
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
        """The text of the answer to one prompt as it comes; the generator returns the `Generated`."""
        alone, every = split_prompts(prompt)
        if not alone:
            raise EngineError(
                f"a list of {len(every)} prompts; stream answers one prompt, and generate(..., stream=...) answers several"
            )
        how = sampling_of(sampling)
        running = self.running(0, self._ids(every[0], raw), max_new_tokens, stop, how)
        cache = self._cache_of([running], 1)  # what is wrong is said here, not at the first text

        def texts() -> Generator[str, None, Generated]:
            yield from (text for _, text in self.run([running], how, cache) if text)
            return running.result()

        return texts()

    def logits(self, ids: Sequence[int] | Tensor, chunk: int = CHUNK) -> Tensor:
        """float32 [n, vocabulary]: the logits after each of n tokens, read in chunks."""
        whole_number("chunk", chunk, 1)
        given = token_ids(ids, None, True, self.shape.vocabulary)
        cache = self.kv_cache(1, len(given))
        rows: Any = np.empty((len(given), self.shape.vocabulary), dtype=np.float32)
        for first in range(0, len(given), chunk):
            part = given[first : first + chunk]
            here = rows[first : first + len(part)]
            self._runner.forward_tokens(cache, [(0, part, first)], range(len(part)), here, [len(given)])
        return torch.from_numpy(rows)

    def kv_cache(self, sequences: int, positions: int) -> KVCache:
        """A KV cache for `sequences` of at most `positions` tokens. EngineError where they cannot be had."""
        return self._runner.kv_cache(sequences, positions)

    memory = kv_cache  # as 0.1.0 called it

    def forward(self, cache: KVCache, chunks: Sequence[Chunk], wanted: Sequence[int], lengths: Lengths = None) -> Any:
        """float32 [len(wanted), vocabulary]: the logits after the last token of the chunks that are wanted, by index.

        chunks: (slot in the cache, token ids, position of the first), one for each sequence; positions go on from what
        the cache holds of that slot. lengths: how long the text of each chunk is, its end where None: with LongRoPE a text
        that grows beyond the original positions is to be read again from its first token. The result stands until the next
        forward with this cache; copy what is to last.
        """
        return self._runner.forward(cache, chunks, wanted, lengths)

    def conversation(self, system: str | None = None, **sampling: Any) -> CachedConversation:
        """A conversation with this model. system: the system message; the others are the fields of `Sampling`."""
        return CachedConversation(self, system, sampling_of(sampling))

    def run(
        self, sequences: Sequence[Running], sampling: Sampling, cache: KVCache, ends: Container[int] | None = None
    ) -> Iterator[tuple[Running, str]]:
        """(sequence, new text) as it comes, until each has a reason to end; new ones and such as have keys and values in `cache`.

        ends: tokens that end a text, the model's own when None.
        """
        ends = self._eos if ends is None else ends
        return Batch(self._runner.core, self.forward, cache, sampling, ends, self.shape.is_long).run(sequences)

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
            index, list(ids), AnswerText(decode, strings), limit, self._runner.core.Random((sampling.seed + index) % 2**64),
            marks(ids, self.shape.vocabulary) if sampling.repetition_penalty != 1 else None,
        )  # fmt: skip

    def _ids(self, prompt: Any, raw: bool) -> list[int]:
        return token_ids(prompt, self._tokenizer, raw, self.shape.vocabulary)

    def _cache_of(self, running: Sequence[Running], batch: int) -> KVCache:
        return self.kv_cache(min(batch, len(running)), max(len(r.ids) + r.limit for r in running))
