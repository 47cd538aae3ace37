"""Distillation of a quantized model from its float model, end to end, with the codes as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import RecipeError
from lowbit.tuning.divergence import divergence
from lowbit.tuning.gradient_descent import Moving, descend
from lowbit.tuning.problem import ModelProblem, Tunables, Tuned
from lowbit.tuning.registry import tuner

_CHUNK = 512  # tokens of one step: half a window costs less in attention, and more steps are worth more than long ones
_HELD_OUT = 8  # windows at most


@tuner("model")
def distill(
    problem: ModelProblem, *, steps: int = 200, rate: float = 0.001, temperature: float = 1.0, seed: int = 0
) -> Tuned:
    """Train the scales, norms and biases of the whole model until it predicts tokens as the float model does.

    Minima and learned levels too; codes stay as they are.
    DWQ (MLX, "distilled weight quantization"): minimise KL(float || quantized) over calibration text, with fixed codes,
    so that what is tuned is about 2/g of the weights and a few hundred steps are enough. Every tenth window (at most
    8, at least 1) is held out: the state with the least divergence there is kept, as it is stored, and that is the
    start if nothing was better. Each step looks at 512 tokens. Needs the whole float model in memory, and a dense
    copy of the quantized weights with their gradients. RecipeError with fewer than two windows.
    """
    if temperature <= 0:
        raise RecipeError("distill: the temperature is above 0; leave it out for 1")
    if len(problem.windows) < 2:
        raise RecipeError(
            "distill holds out a tenth of the calibration windows and was given one; use samples=2 or more"
        )
    held_out, chunks = split(problem.windows)
    tunables = Tunables(problem)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(len(chunks), generator=generator).tolist()

    def loss_at(step: int) -> Tensor:
        problem.say(step, steps)
        ids = chunks[order[step]][None]
        with torch.no_grad():
            wanted = problem.teacher(ids)
        with torch.enable_grad():
            return divergence(problem.student(tunables.dense(), ids), wanted, temperature)

    @torch.no_grad()
    def score() -> float:
        tensors = dict(tunables.dense_as_stored())
        found = [divergence(problem.student(tensors, w[None]), problem.teacher(w[None])) for w in held_out]
        return float(sum(found)) / len(found)

    before, after, step = descend([Moving(tunables.parameters(), rate)], loss_at, steps, score=score)
    if step == 0:  # nothing was better: what was there stays, to the last bit
        return Tuned({}, {}, {"divergence": [before, before], "step": 0, "held_out": len(held_out)})
    weights, vectors = tunables.stored()
    return Tuned(weights, vectors, {"divergence": [before, after], "step": step, "held_out": len(held_out)})


def split(windows: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(windows that are held out, chunks [n] of the others that steps look at)."""
    every = max(10, -(-len(windows) // _HELD_OUT))
    chosen = set(range(min(every, len(windows)) - 1, len(windows), every))
    held_out = [w for i, w in enumerate(windows) if i in chosen]
    chunks = [p for i, w in enumerate(windows) if i not in chosen for p in w.split(_CHUNK) if len(p) > 1]
    return held_out, chunks or [w for i, w in enumerate(windows) if i not in chosen]
