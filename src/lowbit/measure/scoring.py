"""One window through one model: which logits, against which tokens.

Three kinds of model have logits to score:

- causal: row t predicts token t + 1, so a window of L tokens scores L - 1 of them;
- seq2seq: the window is both the input and the labels, as in `model(input_ids, labels=input_ids)`;
  row t predicts token t from the whole input and the labels before t, so the perplexity is that of
  copying and is far below a causal one;
- masked: row t is scored against token t with nothing masked. This pseudo-perplexity says how sure
  the model is of the token that it sees; it compares two copies of a model, not two models.

What the tokenizer put around the text of a window (`Frame`) is read by the model and scored by none of them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit.calibration.windows import Frame
from lowbit.engine.engine import Engine
from lowbit.errors import SourceError
from lowbit.interchange.hf.running import check_ids, check_vocabulary, device_of, evaluating

_NONE = Frame()

MEANING = {
    "causal": "each token predicted from those before it",
    "seq2seq": "copying: the window is input and labels",
    "masked": "pseudo-perplexity: each visible token scored at its own position",
}


def kind_of(model: nn.Module) -> str:
    """How the model is scored: 'causal', 'seq2seq' or 'masked', from its config and class name."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    names = [cls.__name__ for cls in type(model).__mro__]
    return "masked" if any("MaskedLM" in name for name in names) else "causal"


class WindowScorer(Protocol):
    """A model that gives the logits of a window, whichever program runs it."""

    @property
    def kind(self) -> str:
        """'causal', 'seq2seq' or 'masked'."""
        ...

    def check(self, ids: Tensor) -> None:
        """TextError when the model has no such token."""
        ...

    def targets(self, ids: Tensor, frame: Frame = ...) -> Tensor:
        """ids [L] -> the tokens [S] that the rows of `logits` are scored against."""
        ...

    def logits(self, ids: Tensor, frame: Frame = ...) -> Tensor:
        """ids [L] -> logits [S, vocabulary]."""
        ...


@dataclass(frozen=True, eq=False)
class EngineScorer:
    """A decoder that the engine runs. Its logits are float32, whatever its weights are."""

    engine: Engine
    kind = "causal"

    def check(self, ids: Tensor) -> None:
        check_ids(ids, self.engine.shape.vocabulary)

    def targets(self, ids: Tensor, frame: Frame = _NONE) -> Tensor:
        return ids[scored(self.kind, len(ids), frame)]

    def logits(self, ids: Tensor, frame: Frame = _NONE) -> Tensor:
        rows = scored(self.kind, len(ids), frame)
        # The last token that is read is scored by the row before it, so the model need not see it.
        return self.engine.logits(ids[: rows.stop - 1])[rows.start - 1 :]


def scored(kind: str, length: int, frame: Frame) -> slice:
    """Which tokens of a window of `length` are scored: those of the text, in a causal model but its very first."""
    first = len(frame.before)
    return slice(max(first, 1) if kind == "causal" else first, length - len(frame.after))


@dataclass(frozen=True)
class Scorer:
    """A model of transformers with what is known about calling it."""

    model: nn.Module
    kind: str
    device: torch.device
    options: dict[str, Any]

    @staticmethod
    def of(model: nn.Module) -> Scorer:
        parameters = inspect.signature(model.forward).parameters
        kind = kind_of(model)
        options: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        return Scorer(model, kind, device_of(model), options)

    def check(self, ids: Tensor) -> None:
        """TextError when the model has no such token."""
        check_vocabulary(self.model, ids)

    def targets(self, ids: Tensor, frame: Frame = _NONE) -> Tensor:
        """ids [L] -> the tokens [S] that the rows of `logits` are scored against."""
        return ids[scored(self.kind, len(ids), frame)]

    def logits(self, ids: Tensor, frame: Frame = _NONE) -> Tensor:
        """ids [L] -> logits [S, vocabulary] in the model's dtype, on the device of its head."""
        batch = ids.to(self.device)[None]
        extra = {"labels": batch} if self.kind == "seq2seq" else {}
        with evaluating(self.model):
            out = self.model(batch, **extra, **self.options)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch.shape or logits.ndim != 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
            raise SourceError(
                f"{type(self.model).__name__} gives no logits for every token (shape {shape}), so there is "
                "nothing to measure: load it with its language-model head (AutoModelForCausalLM, "
                "AutoModelForSeq2SeqLM or AutoModelForMaskedLM)"
            )
        rows, late = scored(self.kind, len(ids), frame), self.kind == "causal"
        return logits[0, rows.start - late : rows.stop - late]
