"""The diagonal of the Fisher information of a model: one backward pass for each short sequence.

Embeddings and heads are differentiated in every fourth sequence. Their gradients, as large as the vocabulary, cost a small model
as much as those of all layers, and their costs are sums over so many rows that few sequences tell them.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.calibration.windows import Frame
from lowbit.errors import RecipeError, SourceError, TextError, WeightError

EVERY = 4  # sequences, of which one has the gradients of embeddings and heads


def squared_gradients(
    model: nn.Module, names: Mapping[str, bool], sequences: Sequence[Tensor], seed: int, autocast: bool,
    progress: Callable[[str, int, int], None] | None = None, steps: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Name -> mean over sequences of the squared gradients of sum_t log p_t(y_t), float32 of the weight's shape.

    `names`: whether a parameter is one that is differentiated in every `EVERY`th sequence only, unless all are.
    """
    wanted = {name: model.get_parameter(name) for name in names}
    rare = {name for name, rarely in names.items() if rarely} if not all(names.values()) else set()
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]  # the model may be the user's own
    squares = {name: torch.zeros_like(p) for name, p in wanted.items()}
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    seq2seq = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    try:
        for i, sequence in enumerate(sequences):
            if progress:
                progress(f"gradients of sequence {i + 1} of {len(sequences)}", i, steps)
            now = {name: p for name, p in wanted.items() if i % EVERY == 0 or name not in rare}
            differentiated = {id(p) for p in now.values()}
            for p, _, _ in before:
                p.requires_grad_(id(p) in differentiated)
                p.grad = None
            ids = sequence.to(next(iter(wanted.values())).device)[None]
            with torch.enable_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
                out = model(ids, **({"labels": ids} if seq2seq else {}), **options)
                logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
            if not isinstance(logits, Tensor) or logits.ndim != 3:
                raise SourceError(f"{type(model).__name__} gives no logits for every token; load it with its head")
            logp = logits[0].float().log_softmax(-1)
            if not math.isfinite(float(logp.detach().sum())):
                raise WeightError(
                    f"{type(model).__name__} gives logits that are not finite, so its sensitivity cannot be measured: a weight is "
                    "NaN or infinite; `lowbit quantize` without a target names it"
                )
            logp.gather(1, _drawn(logp.detach(), generator)).sum().backward()
            for name, p in now.items():
                if p.grad is not None:
                    squares[name].addcmul_(p.grad, p.grad)
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad
    for name, square in squares.items():
        square /= -(-len(sequences) // EVERY) if name in rare else len(sequences)
    return squares


def _drawn(logp: Tensor, generator: torch.Generator) -> Tensor:
    """A label of each row of log-probabilities [n, vocabulary], int64 [n, 1], by the inverse of the cumulative sum.

    Drawn on the CPU, so that a seed means the same labels on every device.
    """
    cumulative = logp.cpu().exp().cumsum(-1)
    at = torch.rand((len(logp), 1), generator=generator) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at, right=True).clamp_max_(logp.shape[-1] - 1).to(logp.device)


def cut(ids: Sequence[Tensor], sequences: int, length: int, frame: Frame) -> tuple[list[Tensor], str]:
    """At most `sequences` rows [length], spread evenly over the text, and the SHA-256 of the text's ids.

    frame: what the tokenizer put around each of `ids`, and what each row gets.
    """
    if length < 2 or sequences < 2:
        raise RecipeError(
            f"{sequences} sequences of {length} tokens measure nothing; use 2 or more sequences of 2 or more tokens"
        )
    rows = [row for x in ids for row in frame.windows(frame.inside(x), length)]
    if len(rows) < 2:
        total = sum(len(x) for x in ids)
        raise TextError(
            f"the calibration text has {total} tokens, fewer than 2 sequences of {length}; give more, or a shorter length"
        )
    picked = torch.linspace(0, len(rows) - 1, min(sequences, len(rows))).round().long().tolist()
    return [rows[i] for i in picked], text_digest(ids)


def text_digest(ids: Sequence[Tensor]) -> str:
    """SHA-256 of token ids [any length] each, each after its length."""
    digest = hashlib.sha256()
    for x in ids:
        digest.update(len(x).to_bytes(8, "little") + x.to(torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()
