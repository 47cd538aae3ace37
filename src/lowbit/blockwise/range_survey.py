"""Which static ranges explode, found before the plan: one pass of the float model over some of the calibration text.

In a few tokens the inputs of single layers reach a thousand times what is usual there (massive activations, Sun et al.
2024). One scale for the tensor must lose these tokens or all others, whatever the estimator. The layers where that is so
get the recipe's fallback, as layer globs of an ordinary recipe; so planned bytes stay exact and the result says it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.blockwise.activation_quantizers import ActivationQuantizers
from lowbit.blockwise.capture import InputCapture
from lowbit.blockwise.groups import find_passes
from lowbit.blockwise.precision import Settings
from lowbit.blockwise.rewriter import Rewriter
from lowbit.blockwise.run import QUANT, CalibratedRun
from lowbit.blockwise.stages import OUTSIDE, Stage
from lowbit.calibration.data import Calibration
from lowbit.formats import IntGrid
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.kernels.heap import trim
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.activation_rules import InputRule, Survey
from lowbit.recipes.layer_globs import globs_of
from lowbit.recipes.recipe import Recipe
from lowbit.solvers import Call

WINDOWS = 8  # explosions are of single tokens that every text has, such as the first; spread evenly over the text
BOUNDLESS = 1e30
_DIGITS = 4  # of a ratio: fewer than the order of additions changes


def judged(plan: Plan) -> list[str]:
    """Weights whose static inputs may fall back: integers, and static by `a=` rather than by a glob of their own."""
    recipe = plan.recipe
    if recipe.fallback is None:
        return []
    return [
        t.name
        for t in plan.tensors
        if _static(t) and not any(recipe.matches(p, t.name) for p, _ in recipe.layer_inputs)
    ]


def _static(t: TensorPlan) -> bool:
    fmt = None if t.inputs is None or not t.inputs.static else t.inputs.format
    return fmt is not None and isinstance(fmt.grid, IntGrid)  # steps of floats follow the value


def survey(
    plan: Plan, source: Source, calibration: Calibration, room: Path, settings: Settings, key: str = "",
    told: Callable[[str], None] = lambda name: None,
) -> Survey:  # fmt: skip
    """Largest to typical input of every judged weight, seen through the recipe's transforms; `room`: a folder for states.

    `key` is kept with it: what it depends on. `told` is given the name of each block before it is run.
    """
    assert plan.recipe.fallback is not None
    found = _SurveyRun(plan, source, _some(calibration), room, settings).ratios(told)
    trim()
    ratios = {name: float(f"{found[name]:.{_DIGITS}g}") for name in judged(plan) if name in found}
    return Survey(key, plan.recipe.fallback.over, ratios)


def with_survey(plan: Plan, source: Source, found: Survey) -> Plan:
    """The plan in which the layers of exploded ranges have the recipe's fallback, said by globs before its own."""
    recipe = plan.recipe
    if found.exploded:
        assert recipe.fallback is not None
        rule = InputRule(recipe.fallback.inputs)
        globs = tuple((g, rule) for g in globs_of(found.exploded, [t.name for t in plan.tensors]))
        recipe = replace(recipe, layer_inputs=(*globs, *recipe.layer_inputs), fallback=None, name=None)
        plan = make_plan(source, recipe, context=plan.context, max_shard_bytes=plan.max_shard_bytes)
    return replace(plan, survey=found)


def recalled(head: Mapping[str, Any], key: str) -> Survey | None:
    """The survey that the journal of an unfinished run holds, if it depends on the same."""
    found = head.get("survey")
    return Survey(**found) if isinstance(found, dict) and found.get("key") == key else None


def remembered(found: Survey | None) -> dict[str, Any]:
    """What `recalled` reads."""
    return {} if found is None else {"survey": asdict(found)}


def _some(calibration: Calibration) -> Calibration:
    count = len(calibration.ids)
    taken = min(WINDOWS, count)
    return replace(calibration, ids=tuple(calibration.ids[i * count // taken] for i in range(taken)))


class _SurveyRun(CalibratedRun):
    """The calibrated driver with nothing quantized: blocks are rewritten, run once, and looked at."""

    def __init__(self, plan: Plan, source: Source, calibration: Calibration, folder: Path, settings: Settings) -> None:
        plain = replace(plan, recipe=replace(plan.recipe, tuner=None, weighting=None, solver=None))
        super().__init__(plain, source, calibration, folder, settings)
        self.rewriter = Rewriter.of(source, _cheap(plan.recipe))
        self.judged = set(judged(plan))

    @torch.no_grad()
    def ratios(self, told: Callable[[str], None]) -> dict[str, float]:
        """Of each judged weight that the text reaches: largest |x| / root mean square of the median token."""
        inside = {t for t in self.tensors for stage in self.stages if stage.owns(t)}
        around = [t for t in self.tensors if t not in inside]
        later = self.around = [t for t in around if self._multiplies(t)]
        for name in around:
            if self.tensors[name].kind != "head" or later:
                self.live.place(name, self.source.read(name))
        found: dict[str, float] = {}
        for i, stage in enumerate(self.stages):
            names = [t for t in self.tensors if stage.owns(t)]
            if i and not later:
                self._drop_embeddings(i, stage, names)
            told(stage.name)
            found |= self._look(i, stage, names)
            self.states.commit(i)
            if i and self.stages[i - 1].chain == stage.chain:
                self.states.drop(i - 1)
            for name in names:
                self.live.place(name, None)
        return found | (self._look(len(self.stages), OUTSIDE, later) if self.judged & set(later) else {})

    def _look(self, i: int, stage: Stage, names: Iterable[str]) -> dict[str, float]:
        weights = {name: self.source.read(name) for name in names}
        for name, weight in weights.items():
            self.live.place(name, weight)
        multiplied = [name for name in weights if self._multiplies(name)]
        watched = {name: self.live.get(name) for name in multiplied}
        passes = find_passes(watched, lambda: self._run(i, stage, 0, QUANT), stage.name or None) if watched else []
        stored = ActivationQuantizers(self.plan)
        if self.rewriter is not None:
            self._rewrite(i, stage, passes, weights, stored)
        groups = {group.first: group for pass_ in passes for group in pass_ if self.judged & set(group.members)}
        spreads = {first: Spread() for first in groups}

        def seen(name: str, expert: int | None, x: Tensor) -> Tensor:
            x = stored.divided(name, x)
            if name in spreads:
                spreads[name].add(x)
            return x

        for batch in range(len(self.batches)):
            with InputCapture({name: self.live.get(name) for name in multiplied}, seen):
                out = self._run(i, stage, batch, QUANT)
            if stage is not OUTSIDE:
                self.states.save(i, QUANT, batch, out)
        return {
            name: spreads[first].ratio()
            for first, group in groups.items()
            for name in group.members
            if name in self.judged
        }


class Spread:
    """How far the largest value of an input lies from the usual ones."""

    def __init__(self) -> None:
        self.largest, self.tokens = 0.0, [torch.zeros(0)]

    def add(self, x: Tensor) -> None:
        """See x [..., channels]."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.largest = max(self.largest, float(x.abs().max()))
        self.tokens.append(x.square().mean(1).sqrt())

    def ratio(self) -> float:
        """max |x| / median over tokens of the root mean square over channels; 0 of nothing but zeros.

        Where most tokens are zero throughout, so that nothing is typical, it is BOUNDLESS, which JSON can hold.
        """
        typical = float(torch.cat(self.tokens).median()) if self.largest else 1.0
        return self.largest / typical if typical else BOUNDLESS


def _cheap(recipe: Recipe) -> Recipe:
    """Rounds weights to nearest: what scales of channels are weighed with, where they are searched for at all."""
    fit = Call("absmax")
    return replace(recipe, solver=None, fit=fit if fit.method.declines(recipe.format) is None else None)
