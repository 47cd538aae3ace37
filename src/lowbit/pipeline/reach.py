"""What of a model calibration text does not come to: said in the plan, and checked before the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lowbit.blockwise.skeleton import Skeleton
from lowbit.blockwise.text_path import made_up_ids, text_path
from lowbit.errors import RecipeError, SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.planning.plan import Plan


def with_reach(plan: Plan, source: Source) -> Plan:
    """The plan with a sentence on the weights that text does not come to; as it is where the model has no other parts than those of text.

    No weight is read.
    """
    config = source.config
    if config is None or text_config(config) is config or not plan.recipe.calibrated().uses_calibration:
        return plan
    try:
        return _told(plan, _missed(plan, source))
    except SourceError:  # said where calibration is asked for
        return plan


def with_text(plan: Plan, source: Source) -> Plan:
    """The same for a run over text that is about to begin. SourceError where the model reads none, RecipeError where the recipe wants the
    range of an input that no text comes to."""
    missed = _missed(plan, source)
    static = [t.name for t in missed if t.inputs is not None and t.inputs.static]
    if static:
        raise RecipeError(
            f"text does not come to {static[0]!r}{f' and {len(static) - 1} more' if static[1:] else ''}, so that the ranges of their "
            "inputs cannot be found beforehand; let them be found while running, as in a=int8:token"
        )
    return _told(plan, missed)


def _missed(plan: Plan, source: Source) -> list[TensorPlan]:
    names = set(
        text_path(Skeleton(source, plan.tied).module, made_up_ids(source.config)).misses(plan.tensors, plan.tied)
    )
    return [t for t in plan.tensors if t.name in names and t.format is not None]


def _told(plan: Plan, weights: Sequence[TensorPlan]) -> Plan:
    if not weights:
        return plan
    share = sum(t.count for t in weights) / max(1, plan.parameters)
    note = (
        f"calibration text does not come to {len(weights)} weights ({share:.1%} of the parameters), such as {weights[0].name}: "
        "they are quantized without it"
    )
    return replace(plan, notes=(*plan.notes, note))
