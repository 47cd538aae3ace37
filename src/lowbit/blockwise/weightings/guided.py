"""guided: tokens count by how much the loss depends on what the layer makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.blockwise.block_runner import model_inputs
from lowbit.blockwise.capture import InputCapture
from lowbit.errors import SourceError
from lowbit.solvers.registry import weighting

_CLIPPED = 0.999  # quantile of the weights that larger ones are cut to


@weighting
def guided(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor], context: AbstractContextManager[Any],
    *, seed: int = 0,
) -> Mapping[str, list[Tensor]]:  # fmt: skip
    """Let those tokens count more on which the predictions of the model depend more.

    w_t = mean over outputs j of (dL/dy_tj)^2, so that H = sum_t w_t x_t x_t' is the Fisher information's block of W.
    L = sum_t log p_t(label), labels drawn from the model's own distribution, so that its expectation is the Hessian of
    KL(float || quantized). One backward pass of the whole float model for each window. Returns for each weight and
    micro-batch [tokens], mean 1 over the text, the largest 0.1 % cut. Source: Kim et al. 2025 (GuidedQuant), equation 6,
    with one group of outputs.
    """
    watched = {name: model.get_parameter(name) for name in names}
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    generator = torch.Generator().manual_seed(seed)
    before = [(p, p.requires_grad) for p in model.parameters()]
    entry = model.get_input_embeddings().weight  # type: ignore[operator]
    for p, _ in before:
        p.requires_grad_(p is entry)  # activations need gradients, weights do not
    try:
        for batch in batches:
            rows: dict[str, list[Tensor]] = {name: [] for name in names}
            for ids in batch:
                gradients = _squared_gradients(model, ids[None], watched, generator, context)
                entry.grad = None
                for name in names:
                    rows[name].append(gradients.get(name, torch.zeros(len(ids))))
            for name in names:
                found[name].append(torch.cat(rows[name]))
    finally:
        for p, flag in before:
            p.requires_grad_(flag)
            p.grad = None
    return {name: _normal(parts) for name, parts in found.items()}


def _squared_gradients(
    model: nn.Module, ids: Tensor, watched: Mapping[str, Tensor], generator: torch.Generator,
    context: AbstractContextManager[Any],
) -> dict[str, Tensor]:  # fmt: skip
    """[tokens]: the mean over outputs of the squared gradient, of each watched weight that gets one."""
    found: dict[str, Tensor] = {}

    def on_output(name: str, expert: int | None, y: Tensor) -> None:
        if expert is None and y.requires_grad:
            y.register_hook(lambda g: found.__setitem__(name, g.float().square().mean(-1).reshape(-1)))

    with torch.enable_grad(), context, InputCapture(watched, lambda name, expert, x: None, on_output):
        out = model(**model_inputs(model, ids))
    logits = getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise SourceError(f"{type(model).__name__} gives no logits for every token, which guided needs; leave it out")
    logp = logits[0].float().log_softmax(-1)
    labels = torch.multinomial(logp.detach().exp(), 1, generator=generator)
    logp.gather(1, labels).sum().backward()
    return found


def _normal(parts: list[Tensor]) -> list[Tensor]:
    """Cut at the quantile and scaled to mean 1; all ones where no gradient came."""
    whole = torch.cat(parts)
    if float(whole.max()) <= 0:
        return [torch.ones_like(part) for part in parts]
    limit = whole.sort().values[int(_CLIPPED * (len(whole) - 1))]
    if float(limit) <= 0:
        limit = whole.max()
    mean = whole.clamp(max=limit).mean()
    return [part.clamp(max=limit) / mean for part in parts]
