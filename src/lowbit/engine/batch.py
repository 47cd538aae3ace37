"""Sequences on their way through the decoder: chunks of prompts and single tokens, side by side in one forward."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from lowbit.engine.detokenizer import AnswerText
from lowbit.engine.generation import Generated, Sampling

CHUNK = 512  # tokens of prompts in one forward


@dataclass(eq=False)
class Running:
    """One sequence. ids: all its tokens; done: how many of them have keys and values, which are those of a long text or not."""

    index: int
    ids: list[int]
    text: AnswerText
    limit: int  # of generated tokens
    random: Any = None
    seen: Any = None  # uint8 [vocabulary], for the repetition penalty
    slot: int = -1
    done: int = 0
    long: bool = False
    prompt: int = 0
    reason: str = ""
    first: float = 0.0
    last: float = 0.0
    started: float = field(default_factory=perf_counter)

    def __post_init__(self) -> None:
        self.prompt = len(self.ids)

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt

    def become(self, long: bool) -> None:
        """A text that grew into a long one has other rotations from its first token on: all of it is read again."""
        self.done = self.done if long == self.long else 0
        self.long = long

    def push(self, token: int, ends: Container[int]) -> str:
        """The text that can be shown after one more token, which may be the last: `reason` is why. ends: tokens that end a text."""
        self.ids.append(token)
        self.last = perf_counter()
        self.first = self.first or self.last
        text = self.text.push(token)
        if token in ends:
            self.reason = "eos"
        elif self.text.stopped:
            self.reason = "stop"
        elif self.generated >= self.limit:
            self.reason = "length"
        if self.reason:
            text += self.text.close()
            if self.text.stopped:  # also by a stop string in what was held back
                self.reason = "stop"
        return text

    def result(self) -> Generated:
        """What came of it so far."""
        first, last = (t - self.started if t else 0.0 for t in (self.first, self.last))
        return Generated(self.text.text, self.ids[self.prompt :], self.prompt, self.reason, first, last)


Forward = Callable[[Any, Sequence[tuple[int, Sequence[int], int]], Sequence[int], Sequence[int]], Any]


class Batch:
    """Runs sequences until each has ended. At most as many at a time as the KV cache has slots; others wait.

    forward(cache, [(slot, ids, position), ...], wanted, lengths) -> float32 [len(wanted), vocabulary]: the logits after
    the last token of those chunks that are wanted; lengths are those of the texts. is_long: see `Shape`.
    """

    def __init__(
        self,
        core: Any,
        forward: Forward,
        cache: Any,
        sampling: Sampling,
        ends: Container[int],
        is_long: Callable[[int], bool] = lambda length: False,
    ) -> None:
        self._core, self._forward, self._cache = core, forward, cache
        self._sampling, self._ends, self._is_long = sampling, ends, is_long

    def run(self, sequences: Sequence[Running]) -> Iterator[tuple[Running, str]]:
        """(sequence, new text) as it comes; a sequence has ended when it has a reason."""
        waiting, active = list(sequences), list[Running]()
        free = [p for p in range(self._cache.sequences) if p not in {s.slot for s in sequences}][::-1]
        while waiting or active:
            while waiting and (free or waiting[0].slot >= 0):
                sequence = waiting.pop(0)
                sequence.slot = sequence.slot if sequence.slot >= 0 else free.pop()
                active.append(sequence)
            for sequence, logits in self._step(active):
                yield sequence, self._pick(sequence, logits)
            free += [s.slot for s in active if s.reason]
            active = [s for s in active if not s.reason]

    def _step(self, active: Sequence[Running]) -> list[tuple[Running, Any]]:
        """One forward; the sequences whose tokens it finished, and their logits."""
        left, chunks = CHUNK, list[tuple[Running, int]]()
        for sequence in active:
            sequence.become(self._is_long(len(sequence.ids)))
        # Decoding first: each takes one token, and nobody waits for another's prompt longer than a chunk.
        for sequence in sorted(active, key=lambda s: (len(s.ids) - s.done > 1, s.index)):
            count = min(len(sequence.ids) - sequence.done, max(left, 0))
            if len(sequence.ids) - sequence.done == 1:
                count = 1
            if count > 0:
                chunks.append((sequence, count))
                left -= count
        given = [(s.slot, s.ids[s.done : s.done + n], s.done) for s, n in chunks]
        wanted = [i for i, (s, n) in enumerate(chunks) if s.done + n == len(s.ids)]
        logits = self._forward(self._cache, given, wanted, [len(s.ids) for s, _ in chunks])
        for sequence, count in chunks:
            sequence.done += count
        return [(chunks[i][0], logits[row]) for row, i in enumerate(wanted)]

    def _pick(self, sequence: Running, logits: Any) -> str:
        how = self._sampling
        token = self._core.sample(
            logits, sequence.random, sequence.seen, how.temperature, how.top_k, how.top_p, how.min_p,
            how.repetition_penalty,
        )  # fmt: skip
        if sequence.seen is not None:
            sequence.seen[token] = 1
        return sequence.push(token, self._ends)


def marks(ids: Sequence[int], vocabulary: int) -> Any:
    """uint8 [vocabulary]: 1 for the tokens in `ids`."""
    found: Any = np.zeros(vocabulary, dtype=np.uint8)
    found[np.asarray(ids, dtype=np.int64)] = 1
    return found
