"""The arguments of `generate`, checked before anything runs: for the engine and for transformers alike."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from lowbit.engine.generation import Sampling
from lowbit.engine.tokenizer import TextTokenizer
from lowbit.errors import EngineError, RecipeError, nearest


def split_prompts(prompts: Any) -> tuple[bool, list[Any]]:
    """(whether it is one prompt, the prompts): text, or token ids in any sequence, or a list of such."""
    if isinstance(prompts, str):
        return True, [prompts]
    every = _plain(prompts)
    if not isinstance(every, (list, tuple)):
        raise EngineError(f"a prompt is text or token ids, and this is a {type(prompts).__name__}")
    every = [_plain(each) for each in every]
    alone = len(every) > 0 and not isinstance(every[0], (str, list, tuple))
    return alone, [every] if alone else every


def token_ids(prompt: Any, tokenizer: TextTokenizer | None, raw: bool, vocabulary: int) -> list[int]:
    """The token ids of one prompt. tokenizer: of text. EngineError for what is none, or has none."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise EngineError("this model came without a tokenizer; give token ids, or tokenizer=... when opening")
        # In a chat template an empty prompt would be some tokens, but nothing that a model could answer.
        found = tokenizer.prompt(prompt, raw) if prompt else []
        if not found:
            raise EngineError(f"the prompt {prompt!r} has no tokens; write a few words")
    else:
        try:
            found = [operator.index(i) for i in _plain(prompt)]
        except TypeError:
            raise EngineError(f"a prompt is text or token ids, and this is {str(prompt)[:60]!r}") from None
        if not found:
            raise EngineError("a prompt without tokens; give one or more")
    wrong = next((i for i in found if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise EngineError(f"token {wrong} is outside of the vocabulary of {vocabulary}; use the model's own tokenizer")
    return found


def stop_strings(stop: Any) -> list[str]:
    """The strings that end an answer; none for None. RecipeError for what would never end one."""
    if stop is not None and not isinstance(stop, (str, list, tuple, set, frozenset)):
        raise RecipeError(f"stop={stop!r} ends no answer; give a text, or a list of such")
    strings = [stop] if isinstance(stop, str) else list(stop or ())
    for string in strings:
        if not isinstance(string, str) or not string:
            raise RecipeError(f"stop={string!r} ends no answer; give a text")
    return strings


def sampling_of(options: dict[str, Any]) -> Sampling:
    """The `Sampling` of these options. RecipeError for one that there is not."""
    fields = Sampling.__dataclass_fields__
    for name in options:
        if name not in fields:
            raise RecipeError(f"there is no option {name!r}{nearest(name, fields)} (known: {', '.join(fields)})")
    return Sampling(**options)


def whole_number(what: str, value: Any, least: int, most: int | None = None) -> int:
    """`value`, a whole number from `least` on. RecipeError for any other."""
    try:
        found = operator.index(value)
    except TypeError:
        raise RecipeError(f"{what}={value!r} is not a whole number") from None
    if found < least:
        raise RecipeError(f"{what}={found}; ask for {least} or more")
    if most is not None and found > most:
        raise RecipeError(f"{what}={found}; ask for {most} at most")
    return found


def one_of(what: str, value: str, names: Sequence[str]) -> None:
    """RecipeError unless `value` is one of these."""
    if value not in names:
        raise RecipeError(f"{what}={value!r}{nearest(str(value), names)} (known: {', '.join(names)})")


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists."""
    return value.tolist() if hasattr(value, "tolist") else value
