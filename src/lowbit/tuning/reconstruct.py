"""Reconstruction of one block's output: which way each weight is rounded, by gradient descent on the block's error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.formats import QTensor
from lowbit.tuning.gradient_descent import Moving, SignDescent, adam, descend, linear, warm_cosine
from lowbit.tuning.problem import Tuned
from lowbit.tuning.registry import tuner
from lowbit.tuning.weight import TunableWeight, moves_scales


@dataclass(frozen=True)
class BlockProblem:
    """The quantized weights of one block, the float ones they stand for, and what the block is to return.

    `weights` and `floats` by parameter name, both [..., out, in]; `transposed`: those that their modules keep as
    [..., in, out]. `forward(tensors, batch)`: what the block returns with these tensors for the quantized model's
    inputs, float [tokens, width], with gradients; `target(batch)`: what it is to return. `batches`: how many there are.
    """

    weights: Mapping[str, QTensor]
    floats: Mapping[str, Tensor]
    transposed: frozenset[str]
    forward: Callable[[Mapping[str, Tensor], int], Tensor]
    target: Callable[[int], Tensor]
    batches: int
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


@tuner("block", ignores=lambda fmt, stats: () if moves_scales(fmt) else ("scales",))
def reconstruct(
    problem: BlockProblem, *, steps: int = 50, rate: float = 0.01, scales: float = 0.1, drift: int = 1
) -> Tuned:
    """Learn for each weight of a transformer block whether to round it up or down, so that the block keeps its output.

    The scales are learned too.
    SignRound (Cheng et al. 2023, equations 3 to 5; the AutoRound of Intel): w = s clip(round(W / s + V)) with V in
    [-1/2, 1/2] and the scale s (1 + d); steps of fixed length against the sign of the gradient of the output's mean
    squared error, shrinking linearly; roundings pass gradients straight through. Each V starts where the solver's code
    lies, so that W / s + V rounds to it. `rate` is the first step of V, in levels; `scales` times `rate` that of d.
    `drift=1` compares with the float model's own output, and so makes up for the errors of earlier blocks; 0 with what the
    float block makes of the quantized model's inputs. One micro-batch a step. A tenth of them is held out; if the error
    there does not fall, the solver's codes stay.
    """
    weights = {name: TunableWeight(q) for name, q in problem.weights.items()}
    for name, weight in weights.items():
        weight.free_codes(problem.floats[name])
    rounding = [w.move for w in weights.values() if w.move is not None]
    others = [p for w in weights.values() for p in w.parameters() if not any(p is r for r in rounding)]
    moving = [Moving(rounding, rate, 0.5), Moving(others, rate * scales)]
    return _descend(problem, weights, moving, steps, sign=True)


@tuner("block")
def lkd(problem: BlockProblem, *, steps: int = 50, rate: float = 0.01, drift: int = 0) -> Tuned:
    """Train the weights of a transformer block to give the output of the float one, rounding them in every step.

    ZeroQuant (Yao et al. 2022, section 4.3): for one layer at a time, all others frozen, minimise the mean squared
    error between the float layer's output and the quantized one's by gradient descent on its weights, which are rounded
    straight through under the scales that the solver left. `rate` is Adam's, in levels. `drift=0` compares on the same
    inputs, 1 with the float model's own output. A tenth of the micro-batches is held out; if the error there
    does not fall, the solver's codes stay.
    """
    weights = {name: TunableWeight(q) for name, q in problem.weights.items()}
    for name, weight in weights.items():
        weight.free_codes(problem.floats[name])
    rounding = [w.move for w in weights.values() if w.move is not None]
    return _descend(problem, weights, [Moving(rounding, rate)], steps, sign=False)


def _descend(
    problem: BlockProblem, weights: dict[str, TunableWeight], moving: list[Moving], steps: int, sign: bool
) -> Tuned:
    held_out, others = held_out_batches(problem.batches)

    def in_module_layout(name: str, weight: Tensor) -> Tensor:
        return weight.transpose(-1, -2) if name in problem.transposed else weight

    def dtype(name: str) -> torch.dtype:
        return problem.dtypes.get(name, torch.float32)

    def loss_at(step: int) -> Tensor:
        batch = others[step % len(others)]
        with torch.enable_grad():
            dense = {name: in_module_layout(name, w.dense(dtype(name))) for name, w in weights.items()}
            return relative_error(problem.forward(dense, batch), problem.target(batch))

    @torch.no_grad()
    def score() -> float:
        dense = {name: in_module_layout(name, w.tuned().dequantize(dtype(name))) for name, w in weights.items()}
        found = [relative_error(problem.forward(dense, batch), problem.target(batch)) for batch in held_out]
        return float(sum(found)) / len(found)

    method, schedule = (SignDescent, linear) if sign else (adam, warm_cosine)
    before, after, step = descend(
        moving, loss_at, steps, score=score, checks=steps // 5, optimizer=method, schedule=schedule
    )
    tuned = {name: weight.tuned() for name, weight in weights.items()} if step else {}
    return Tuned(tuned, {}, {"error": [before**0.5, after**0.5], "step": step})


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """|output - target|^2 / |target|^2, float32."""
    difference = output.to(torch.float32) - target
    return difference.square().sum() / target.square().sum().clamp_min(1e-30)


def held_out_batches(count: int) -> tuple[list[int], list[int]]:
    """(those that the result is judged by, those that steps look at): every tenth; with one batch it is both."""
    held_out = list(range(min(count, 10) - 1, count, 10))
    return held_out, [b for b in range(count) if b not in held_out] or held_out
