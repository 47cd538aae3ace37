"""A conversation that goes on: its keys and values stay, so that each turn reads only what is new."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lowbit.engine.arguments import whole_number
from lowbit.engine.chat_template import Message
from lowbit.engine.generation import Generated, Sampling
from lowbit.engine.tokenizer import TextTokenizer
from lowbit.errors import EngineError

if TYPE_CHECKING:
    from lowbit.engine.engine import Engine
    from lowbit.engine.fallback import Transformers
    from lowbit.engine.runner import KVCache

_FIRST = 1024  # positions that a conversation begins with


class Conversation(ABC):
    """Turns of a user and a model. system: the system message, before all others."""

    def __init__(self, tokenizer: TextTokenizer, system: str | None) -> None:
        if not tokenizer.has_template:
            raise EngineError("this model has no chat template, so it was not taught to chat; use `lowbit generate`")
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._tokenizer = tokenizer
        self.messages = list(self._system)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._system)

    def ask(
        self,
        text: str,
        show: Callable[[str], object] = lambda text: None,
        max_new_tokens: int = 1024,
        stop: Sequence[str] = (),
    ) -> Generated:
        """The answer; `show` is called with its text as it comes. When interrupted, what was said so far stays."""
        messages: list[Message] = [*self.messages, {"role": "user", "content": text}]
        ids = self._tokenizer.encode(self._tokenizer.chat(messages), special=False)
        said: list[str] = []

        def keep(new: str) -> None:
            said.append(new)
            show(new)

        try:
            return self._answer(ids, keep, max_new_tokens, stop)
        finally:
            if said:
                self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    @abstractmethod
    def _answer(self, ids: list[int], show: Callable[[str], object], limit: int, stop: Sequence[str]) -> Generated: ...


class CachedConversation(Conversation):
    """With an engine: tokens that a text shares with what was read before are not read again, whatever the template does.

    read: how many tokens of its prompt the last turn did read.
    """

    def __init__(self, engine: Engine, system: str | None, sampling: Sampling) -> None:
        super().__init__(engine.tokenizer, system)
        self._engine, self._sampling = engine, sampling
        self._cache: KVCache | None = None
        self._known: list[int] = []  # the tokens that have keys and values
        self._long = False  # which are those of a long text
        self.read = 0

    def _answer(self, ids: list[int], show: Callable[[str], object], limit: int, stop: Sequence[str]) -> Generated:
        limit = _positions_left(limit, ids, self._engine.shape.positions)
        cache = self._cache_for(len(ids) + limit)
        running = self._engine.running(0, ids, limit, stop, self._sampling)
        running.slot = 0
        running.done, running.long = _shared(self._known, ids[:-1]), self._long  # the last is read for its logits
        if not cache.can_go_on(0, running.done):
            running.done = 0  # what was kept exactly of the text before is no more
        running.become(self._engine.shape.is_long(len(ids)))
        self.read = len(ids) - running.done
        try:
            for _, text in self._engine.run([running], self._sampling, cache):
                if text:
                    show(text)
        finally:
            self._known, self._long = running.ids[: running.done], running.long
        return running.result()

    def _cache_for(self, positions: int) -> KVCache:
        """A KV cache of so many positions, the old one where it is enough; it grows by doubling."""
        if self._cache is None or self._cache.positions < positions:
            wanted = _FIRST
            while wanted < positions:
                wanted *= 2
            self._cache = self._engine.kv_cache(1, max(positions, min(wanted, self._engine.shape.positions)))
            self._known = []
        return self._cache


class PlainConversation(Conversation):
    """With transformers: every turn reads all of it."""

    def __init__(self, generator: Transformers, system: str | None, sampling: Sampling) -> None:
        super().__init__(generator.tokenizer, system)
        self._generator, self._sampling = generator, sampling

    def _answer(self, ids: list[int], show: Callable[[str], object], limit: int, stop: Sequence[str]) -> Generated:
        most = self._generator.positions
        limit = limit if most is None else _positions_left(limit, ids, most)
        found: Generated = self._generator.generate(
            [ids], max_new_tokens=limit, stop=stop, stream=lambda new, index: show(new), **vars(self._sampling)
        )[0]
        return found


def _positions_left(limit: int, ids: Sequence[int], positions: int) -> int:
    """How many tokens an answer may have. EngineError where no position is left."""
    left = positions - len(ids)
    if left < 1:
        raise EngineError(
            f"the conversation has {len(ids)} tokens, and this model takes {positions}; begin anew with /reset"
        )
    return min(whole_number("max_new_tokens", limit, 1), left)


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count
