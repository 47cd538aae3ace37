"""What quantizing cost a model that predicts no tokens: embeddings, scores, labels, transcripts, features.

Both models get the same inputs. For every model there is how far its outputs are from the float model's, as a relative error; what that means to
whoever uses it is said by the task that fits it (`tasks/`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.running import check_vocabulary
from lowbit.interchange.pace import Clock
from lowbit.interchange.pooling import Pooling
from lowbit.measure.agreement import mean
from lowbit.measure.calling import called
from lowbit.measure.given_inputs import Given
from lowbit.measure.inputs import inputs_of, takes
from lowbit.measure.quality import Estimate, Progress
from lowbit.measure.tasks.task import Example, Facts, Figure, Task, task_named, task_of
from lowbit.measure.windows import Windows

LEAST = 8  # inputs that are compared whatever that takes


@dataclass(frozen=True)
class Outputs:
    """`error`: |a - b| / |b| of the output `name`, b the float model's, a mean over `inputs` with its standard error.

    task     the use that the model was taken for, a name in `tasks/`; None where it fits none
    figures  what that measures, in the order in which it is told
    how      how the answers came about, such as how embeddings were pooled; "" where there is nothing to say
    count    inputs that were compared, `of` how many: fewer where there was no time for more; None on cards of before
    """

    inputs: str
    name: str
    error: Estimate
    task: str | None = None
    figures: tuple[Figure, ...] = ()
    how: str = ""
    count: int | None = None
    of: int | None = None

    def figure(self, name: str) -> Estimate | None:
        """The figure of that name, None where it was not measured."""
        return next((each.estimate for each in self.figures if each.name == name), None)

    @property
    def cosine(self) -> Estimate | None:
        """That of embeddings of text."""
        return self.figure("cosine")


def takes_text(model: nn.Module) -> bool:
    """Whether a model of transformers can be called with token ids."""
    return takes(model, "input_ids")


def measure_outputs(
    model: nn.Module, base: nn.Module, windows: Windows | None, *, given: Given | None = None, pooling: Pooling | None = None,
    tokenizer: Any = None, folder: Path | None = None, progress: Progress | None = None, seconds: float | None = None,
    clock: Clock = time.perf_counter,
) -> Outputs:  # fmt: skip
    """The outputs of `model` compared with those of `base`.

    windows: of text, None where there is no tokenizer or the model takes no text. given: inputs of the user. pooling: how hidden states become an
    embedding. tokenizer: with which words are made of tokens. folder: of the processors. seconds: after which no further input is begun, once
    there are `LEAST`; None for all. SourceError where no input is known that the
    float model takes, TextError where the tokenizer is another model's, or inputs are not for this model.
    """
    if windows is not None:
        check_vocabulary(base, windows.ids)
    if pooling is not None:  # what comes after the hidden states is no part of an embedding
        model, base = _backbone(model), _backbone(base)
    inputs = inputs_of(base, windows, given, folder)
    first = inputs.make[0]()
    facts = Facts(base, first, called(base, first), pooling, tokenizer, windows if given is None else None)
    use = task_of(facts)
    pairs = None if use is None else use.examples(facts)
    make = inputs.make if pairs is None else [lambda one=one: one for one in pairs]
    errors, found, right, name = list[float](), list[Any](), list[Any](), ""
    until = None if seconds is None else clock() + seconds
    for i, one in enumerate(make):
        if until is not None and i >= LEAST and clock() > until:
            break
        example = one()
        name, a, b = _both(use, facts, model, base, example, found, right)
        errors.append(float((a - b).norm() / b.norm().clamp_min(torch.finfo(torch.float64).tiny)))
        if progress is not None:
            progress(i + 1, len(make))
    # Of pairs of texts, all texts were read where the pairs were not all of them.
    words = inputs.words(len(errors) if pairs is None else len(inputs.make))
    if use is None:
        return Outputs(words, name, mean(errors), count=len(errors), of=len(make))
    figures = use.compare(facts, found, right)
    return Outputs(words, name, mean(errors), use.name, figures, use.words(facts), len(errors), len(make))


def _both(
    use: Task | None,
    facts: Facts,
    model: nn.Module,
    base: nn.Module,
    example: Example,
    found: list[Any],
    right: list[Any],
) -> tuple[str, Tensor, Tensor]:
    """One input through both; (name, value, float model's value) of the output that counts most, in float64."""
    answer = called(base, example)
    name = next(iter(answer))
    if use is not None:
        right.append(use.read(facts, base, example, answer))
    try:
        mine = called(model, example)
        if use is not None:
            found.append(use.read(facts, model, example, mine))
    except SourceError as error:
        raise SourceError(f"the quantized model fails where the float model does not: {error}") from None
    a, b = (each[name].double().cpu() if name in each else torch.empty(0) for each in (mine, answer))
    if a.shape != b.shape:
        raise SourceError(
            f"the models give outputs of {tuple(a.shape)} and {tuple(b.shape)}: compare copies of one model"
        )
    return name, a, b


def _backbone(model: nn.Module) -> nn.Module:
    """The model without its head; itself where it has none."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) and callable(getattr(inner, "can_generate", None)) else model


def answers_of(outputs: Outputs) -> str:
    """What the model gives, in the plural, for sentences: "embeddings"."""
    use = task_named(outputs.task)
    return "outputs" if use is None else use.answers
