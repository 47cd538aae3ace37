"""From tokens to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"  # what a decoder puts for bytes that are no character, or not yet
_WINDOW = 64


class Detokenizer:
    """Tokens in, text out, such that the texts joined are what decoding all tokens at once gives.

    A character may be spread over tokens, and what a token looks like may depend on the one before it; so a window of
    the last tokens is decoded again, and what is new in it is given out, except what may still become a character.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text

    def push(self, token: int) -> str:
        """The text that this token completes; often empty."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text.rstrip(_HALF)
        new, self._given = whole[self._given :], max(self._given, len(whole))
        # The window starts anew with one token of context, which must make sense alone.
        if len(self._window) > _WINDOW and len(whole) == len(text):
            context = self._decode(self._window[-1:])
            if context and _HALF not in context:
                self._window, self._given = self._window[-1:], len(context)
        return new

    def close(self) -> str:
        """What was held back and never became a character."""
        return self._decode(self._window)[self._given :]


class StopStrings:
    """Lets text through up to the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""
        self.found = False

    def push(self, new: str) -> str:
        """What of the text so far can be shown."""
        text = self._held + new
        ends = [i for i in (text.find(s) for s in self._stop) if i >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def close(self) -> str:
        """What was held back and never became a stop string."""
        held, self._held = self._held, ""
        return held


class AnswerText:
    """Both together: the text of one sequence as its tokens come."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._stream, self._stop = Detokenizer(decode), StopStrings(stop)
        self.text = ""

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; it is not in the text."""
        return self._stop.found

    def push(self, token: int) -> str:
        """The new text that can be shown; nothing after a stop string."""
        return "" if self.stopped else self._shown(self._stop.push(self._stream.push(token)))

    def close(self) -> str:
        """What is still held back, when no more tokens come."""
        if self.stopped:
            return ""
        last = self._stop.push(self._stream.close())
        return self._shown(last if self.stopped else last + self._stop.close())

    def _shown(self, new: str) -> str:
        self.text += new
        return new
