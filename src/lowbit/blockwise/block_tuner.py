"""Tuners of one block inside the calibrated driver: targets kept on the disk, the block run with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lowbit.blockwise.hidden_states import InputFile
from lowbit.errors import SourceError
from lowbit.formats import QTensor
from lowbit.planning.plan import Plan
from lowbit.tuning.reconstruct import BlockProblem
from lowbit.weights.solve import Solved, six_digits

# Runs the block for a micro-batch with these tensors in place of its own; returns what it returns.
Run = Callable[[Mapping[str, Tensor], int], Any]


class BlockTuner:
    """The recipe's tuner of blocks. `drift`: it compares with what the float model itself returns."""

    def __init__(self, plan: Plan, folder: Path, batches: int, fast: torch.dtype) -> None:
        call = plan.recipe.tuner_of("block")
        assert call is not None
        self.call, self.batches, self.fast = call, batches, fast
        self.drift = bool({**call.method.options, **dict(call.options)}.get("drift"))
        self.targets = InputFile(folder, torch.float32)

    @staticmethod
    def of(plan: Plan, folder: Path, batches: int, fast: torch.dtype) -> BlockTuner | None:
        """None when the recipe has none."""
        return None if plan.recipe.tuner_of("block") is None else BlockTuner(plan, folder, batches, fast)

    def begin(self) -> None:
        """A new block."""
        self.targets.rewind()

    def record(self, output: Any) -> None:
        """What the block is to return for the next micro-batch."""
        self.targets.append(hidden(output))

    def remove(self) -> None:
        """The block is done: remove the file."""
        self.targets.remove()

    def tune(self, solved: Mapping[str, Solved], floats: Mapping[str, Tensor], run: Run) -> dict[str, Solved]:
        """The weights of the block with other codes and scales, where that lowers its error; the others as they were.

        `floats`: the weights as the source stores them.
        """
        weights: dict[str, QTensor] = {}
        for name, one in solved.items():
            q = one.qtensor()
            if q is not None:
                weights[name] = q
        plans = {name: solved[name].plan for name in weights}
        problem = BlockProblem(
            weights,
            {name: plans[name].as_rows(floats[name].float()).contiguous() for name in weights},
            frozenset(name for name, t in plans.items() if t.transposed),
            lambda tensors, batch: hidden(run(tensors, batch)),
            self.targets.read,
            self.batches,
            {name: self.fast for name, t in plans.items() if t.kind in ("linear", "conv1d")},
        )
        tuned = self.call.method.function(problem, **dict(self.call.options))
        before, after = (six_digits(e) for e in tuned.facts["error"])
        out = dict(solved)
        for name in weights if not tuned.weights else ():
            note = f"{self.call.name}: nothing better than an error of the block's output of {before:.4g}"
            out[name] = replace(solved[name], note=_joined(solved[name].note, note))
        for name, q in tuned.weights.items():
            own = solved[name]
            error = (q.dequantize() - problem.floats[name]).norm() / problem.floats[name].norm().clamp_min(1e-30)
            parts = {f"{name}.{part}": tensor.contiguous() for part, tensor in q.parts().items()}
            note = f"{self.call.name}: error of the block's output {before:.4g} -> {after:.4g}"
            out[name] = replace(
                own, stored=own.stored | parts, error=six_digits(float(error)), output=None,
                note=_joined(own.note, note),
            )  # fmt: skip
        return out


def _joined(note: str, more: str) -> str:
    return f"{note}; {more}" if note else more


def hidden(output: Any) -> Tensor:
    """The first floating-point tensor of what a block returns, [tokens, width]."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return leaf.reshape(-1, leaf.shape[-1])
    raise SourceError(f"a block returns {type(output).__name__} without a tensor, so that it cannot be reconstructed")
