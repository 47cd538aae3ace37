"""KL(float || quantized) of next-token distributions, in chunks, so that a large vocabulary needs little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 22  # logits in float32 at a time


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), the mean over tokens, in nats; a float32 scalar.

    Both [tokens, vocabulary], of any floating-point type; `teacher` gets no gradient. With z the student's logits
    the gradient is T (softmax(z / T) - softmax(teacher / T)) / tokens; it is computed with the loss and kept in the
    type of `logits`. The factor T^2 keeps gradients of one size whatever T is (Hinton et al. 2015, section 2).
    """
    result: Tensor = _Divergence.apply(logits, teacher, temperature)
    return result


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        tokens, vocabulary = logits.shape
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(logits) if wanted else None
        total = 0.0
        step = max(1, _CHUNK // vocabulary)
        for start in range(0, tokens, step):
            rows = slice(start, start + step)
            q = _log_softmax(logits[rows], temperature)
            log_p = _log_softmax(teacher[rows], temperature)
            p = log_p.exp()
            total += float((p * (log_p - q)).sum())
            if gradient is not None:
                gradient[rows] = q.exp_().sub_(p).mul_(temperature / tokens)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.tensor(total / tokens * temperature**2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    x = logits.to(torch.float32)
    return (x if temperature == 1 else x / temperature).log_softmax(-1)
