"""One window through one model: which logits, against which tokens.

Three kinds of model have logits to score:

- causal: row t predicts token t + 1, so a window of L tokens scores L - 1 of them;
- seq2seq: the window is both the input and the labels, as in `model(input_ids, labels=input_ids)`;
  row t predicts token t from the whole input and the labels before t, so the perplexity is that of
  copying and is far below a causal one;
- masked: row t is scored against token t with nothing masked. This pseudo-perplexity says how sure
  the model is of the token that it sees; it compares two copies of a model, not two models.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SourceError, TextError

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


def device_of(model: nn.Module) -> torch.device:
    """The device that takes the model's input: that of its input embedding, else of its first tensor."""
    try:
        return model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr, return-value]
    except (AttributeError, NotImplementedError):
        pass  # a plain module, or an embedding that keeps packed buffers instead of a weight
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model's positions cover, or None when it has no limit.

    From the config. RoBERTa and its kin start counting after the padding index, which costs them
    that many rows of their position table: seen in the table's own `padding_idx`.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(inner, name, None)
        if isinstance(limit, int) and limit > 0:
            break
    else:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        is_table = name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit
        if is_table and isinstance(padding, int):
            return limit - padding - 1
    return limit


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True)
class Scorer:
    """A model with what is known about calling it."""

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

    def targets(self, ids: Tensor) -> Tensor:
        """ids [L] -> the tokens [S] that the rows of `logits` are scored against."""
        return ids[1:] if self.kind == "causal" else ids

    def logits(self, ids: Tensor) -> Tensor:
        """ids [L] -> logits [S, vocabulary] in the model's dtype, on the device of its head."""
        batch = ids.to(self.device)[None]
        extra = {"labels": batch} if self.kind == "seq2seq" else {}
        out = self.model(batch, **extra, **self.options)
        logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
        if not isinstance(logits, Tensor) or logits.shape[:2] != batch.shape or logits.ndim != 3:
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else "none"
            raise SourceError(
                f"{type(self.model).__name__} gives no logits for every token (shape {shape}), so there is "
                "nothing to measure: load it with its language-model head (AutoModelForCausalLM, "
                "AutoModelForSeq2SeqLM or AutoModelForMaskedLM)"
            )
        return logits[0, :-1] if self.kind == "causal" else logits[0]


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """TextError when a token id has no row in the model's embedding: the tokenizer is another model's."""
    config: Any = getattr(model, "config", None)
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(inner, "vocab_size", None)
    if isinstance(size, int) and int(ids.max()) >= size:
        raise TextError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {size} tokens: "
            "use the tokenizer that belongs to the model"
        )
