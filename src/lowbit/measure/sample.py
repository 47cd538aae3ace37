"""A prompt and what the models answer to it: the figure that needs no explanation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from lowbit.engine.engine import Engine
from lowbit.engine.fallback import Transformers
from lowbit.engine.tokenizer import AnyTokenizer
from lowbit.interchange.hf.running import evaluating
from lowbit.measure.kept import Kept


@dataclass(frozen=True)
class Sample:
    """`answer` of the quantized model and `base_answer` of the float one, greedy and cut at a length."""

    prompt: str
    answer: str
    base_answer: str | None = None


def answer(model: nn.Module, tokenizer: Any, prompt: str, *, new: int = 60) -> str:
    """The greedy answer of at most `new` tokens, as `lowbit generate` gives it where transformers runs the model."""
    generator = Transformers(model, AnyTokenizer(tokenizer), "")
    with evaluating(model):
        return answered(generator, generator.positions, prompt, new)


def answered(generator: Engine | Transformers, positions: int | None, prompt: str, new: int) -> str:
    """The greedy answer of at most `new` tokens; positions: of prompt and answer together at most."""
    ids = generator.tokenizer.prompt(prompt)
    limit = new if positions is None else min(new, positions - len(ids))
    return str(generator.generate(ids, max_new_tokens=limit)).strip() if limit > 0 else ""


def take_sample(
    model: nn.Module, tokenizer: Any, prompt: str, *, base: nn.Module | None = None, new: int = 60
) -> Sample | None:
    """Both models' answers, or None when the model cannot generate."""
    able = getattr(model, "can_generate", None)
    if not callable(able) or not able():
        return None
    mine = answer(model, tokenizer, prompt, new=new)
    return Sample(prompt, mine, answer(base, tokenizer, prompt, new=new) if base is not None else None)


def kept_sample(kept: Kept, take: Callable[[], Sample | None]) -> Sample | None:
    """The answers that a run before this one kept, else those that `take` gives."""

    def taken() -> dict[str, Any] | None:
        found = take()
        return None if found is None else asdict(found)

    found = kept.found("answers", taken)
    return None if found is None else Sample(**found)
