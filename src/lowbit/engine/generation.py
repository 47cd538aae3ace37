"""What is asked of a generation, and what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Protocol

from lowbit.errors import RecipeError


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked: penalty, temperature, top-k, top-p and min-p apply in this order.

    temperature 0: the likeliest token; top_k, top_p and min_p would be ignored then, and are errors. top_k 0, top_p 1, min_p 0,
    repetition_penalty 1: off.
    seed: of the first prompt; prompt i has seed + i, so that the same prompt given twice has two answers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("top_k", "seed"):
            if not isinstance(getattr(self, name), Integral):
                raise RecipeError(f"{name}={getattr(self, name)!r} is not a whole number")
            object.__setattr__(
                self, name, int(getattr(self, name))
            )  # of numpy, seeds overflow where prompts are counted
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), Real) or not isfinite(getattr(self, name)):
                raise RecipeError(f"{name}={getattr(self, name)!r} is not a number")
        rules = {
            "temperature": (self.temperature >= 0, "0 or more"), "top_k": (0 <= self.top_k < 2**31, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"), "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"), "seed": (0 <= self.seed < 2**64, "0 or more, below 2**64"),
        }  # fmt: skip
        for name, (fine, what) in rules.items():
            if not fine:
                raise RecipeError(f"{name}={getattr(self, name)}; it must be {what}")
        given = {"top_k": self.top_k > 1, "top_p": self.top_p < 1, "min_p": self.min_p > 0}
        ignored = [name for name, is_given in given.items() if is_given]
        if self.temperature == 0 and ignored:
            raise RecipeError(
                f"{' and '.join(ignored)} would be ignored at temperature 0, which takes the likeliest token every time; give a "
                "temperature above 0, such as 0.7"
            )


@dataclass(frozen=True)
class Generated:
    """One answer.

    tokens: what was generated, the token that ended it included. reason: "eos", "length" or "stop" (a stop string,
    which is not in the text). first_seconds: from the call to the first token; seconds: from the call to the last.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    reason: str
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding alone: tokens after the first by the time after the first."""
        return (len(self.tokens) - 1) / max(self.seconds - self.first_seconds, 1e-9) if len(self.tokens) > 1 else 0.0

    def __str__(self) -> str:
        return self.text


class OnText(Protocol):
    """Called with each new text and the number of its prompt."""

    def __call__(self, text: str, index: int) -> object: ...


Prompt = str | Sequence[int]
