"""What a recipe means for an exporter and one model: the recipe that the exporter can hold, before any work.

A target has names of its own (`q4_k_m`), its own sense of some presets, a format for embeddings, and formats that do
not fit every width. What comes out is an ordinary recipe, whose globs say what was put in place of what.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from lowbit.convert.refusal import check_kv, refuse
from lowbit.errors import ExportError
from lowbit.formats import Format, parse_format
from lowbit.interchange.exporters.exporter import Exporter, exporter_named
from lowbit.interchange.opening import open_source
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import Contents, TensorPlan
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.layer_globs import globs_of, with_layers
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import EMBED, KEEP, Recipe
from lowbit.recipes.rewriting import rewritten
from lowbit.recipes.spelling import accepted

DATA_FREE, CALIBRATED = "search", "qronos"  # the methods of a mix, which names formats alone


@dataclass(frozen=True)
class Prepared:
    """A recipe that an exporter can hold of one model, its plan, and what stands in place of what -> in how many tensors.

    kv: what keys and values are to be kept in, None where that is not said
    """

    exporter: Exporter
    recipe: Recipe
    plan: Plan
    changes: dict[str, int]
    kv: str | None = None


def planned(
    kind: Exporter, source: Source, recipe: str | Recipe, calibrated: bool = False, kv: str | None = None
) -> Prepared:
    """What `recipe` means for an exporter and a source that is open, checked. ExportError where it cannot be held."""
    wanted = recipe_for(kind, recipe, source, calibrated)
    rewritten_source = rewritten(source, wanted)
    plan, changes = fitted(kind, make_plan(rewritten_source, wanted), rewritten_source)
    if kv is not None:
        check_kv(kind, kv, contents_of(plan, rewritten_source))
    return Prepared(kind, plan.recipe, plan, changes, kv)


def contents_of(plan: Plan, source: Source) -> Contents:
    """A plan as exporters see it, before anything is quantized."""
    return Contents(plan.label, str(plan.recipe), source.config, {t.name: t for t in plan.tensors}, plan.tied)


def recipe_for(kind: Exporter, text: str | Recipe, source: Source, calibrated: bool = False) -> Recipe:
    """What a recipe means for an exporter: its own mixes by name, its own sense of some presets, its own embeddings.

    `calibrated`: whether calibration text is at hand.
    """
    if isinstance(text, str):
        name, comma, settings = text.partition(",")
        name = accepted(name)
        method = CALIBRATED if calibrated else DATA_FREE
        if name in kind.mixes():
            mix = kind.mix(name, floats_of(source))
            if mix is None:
                raise ExportError(f"{kind.name} has no mix {name} for {source.label}; name a recipe or a format")
            recipe = Recipe.parse(f"{method}@{mix.base},embed={mix.embed}{comma}{settings}")
            formats: dict[str, list[str]] = {}
            for tensor, text_of in mix.layers.items():
                formats.setdefault(text_of, []).append(tensor)
            globs = tuple((g, parse_format(t)) for t, names in formats.items() for g in globs_of(names, source.tensors))
            return replace(recipe, layers=(*globs, *recipe.layers), name=None if comma or name in PRESETS else name)
        if name in PRESETS and name in kind.recipes:
            recipe = Recipe.parse(kind.recipes[name][calibrated] + comma + settings)
        else:
            recipe = Recipe.parse(text)
        text = recipe
    # Without a name: that of a preset would be expanded again, to what it is without an exporter.
    return replace(_with_embed(kind, text.calibrated() if calibrated else text), name=None)


def floats_of(source: Source) -> Contents:
    """A float model as exporters see it: every tensor kept."""
    params = source.inventory.params
    tensors = {
        name: TensorPlan(name, spec.shape, params[name].kind, spec.dtype, params[name].transposed)
        for name, spec in source.tensors.items()
    }
    return Contents(source.label, "", source.config, tensors, dict(source.inventory.tied))


def candidates(target: str, model: Any) -> dict[str, Any]:
    """What `allocate` is to choose from for an exporter, and which layers get one format there."""
    kind = exporter_named(target)
    return {"candidates": kind.candidates(floats_of(open_source(model))), "share": kind.fuses}


def _with_embed(kind: Exporter, recipe: Recipe) -> Recipe:
    return replace(recipe, embed=_format(kind.embed)) if kind.embed and recipe.embed == EMBED else recipe


def _format(text: str) -> Format | None:
    """A format as exporters name it; `keep` is None."""
    return None if text == KEEP else parse_format(text)


def fitted(kind: Exporter, plan: Plan, source: Source) -> tuple[Plan, dict[str, int]]:
    """The plan with formats that fit every tensor's shape, and what was put in place of what -> how many tensors.

    Where a format is one of the exporter's but a tensor's shape is not for it, the nearest that the exporter has takes
    its place, said in the recipe as layer globs. ExportError for everything else that the exporter cannot hold.
    """
    contents = contents_of(plan, source)
    problems = kind.check(contents)
    hopeless = [p for p in problems if not p.shape]
    refuse(kind, hopeless or kind.check_tokenizer(source.tokenizer(), contents))
    if not problems:
        return plan, {}
    formats = {t.name: t.format for t in plan.tensors if source.inventory.params[t.name].keep is None}
    changes: Counter[str] = Counter()
    for problem in problems:
        formats[problem.tensor] = _format(problem.nearest)
        changes[f"{problem.nearest} instead: {problem.reason}"] += 1
    recipe = _said_shortly(plan.recipe, formats, plan)
    again = make_plan(source, recipe, context=plan.context, max_shard_bytes=plan.max_shard_bytes)
    refuse(kind, kind.check(contents_of(again, source)))
    return again, dict(changes.most_common())


def _said_shortly(recipe: Recipe, formats: dict[str, Format | None], plan: Plan) -> Recipe:
    """`recipe` with these formats: the most common ones as its own, the others as globs."""
    kinds = {t.name: t.kind for t in plan.tensors if t.name in formats}
    weights: Counter[Format] = Counter()
    for t in plan.tensors:
        fmt = formats.get(t.name)
        if fmt is not None and t.kind not in ("embedding", "head"):
            weights[fmt] += t.count
    tops = {formats[n] for n, kind in kinds.items() if kind in ("embedding", "head")}
    calls = [call for call in (recipe.fit, recipe.solver) if call is not None]
    served = [f for f, _ in weights.most_common() if all(call.method.declines(f) is None for call in calls)]
    base = served[0] if served else recipe.format
    plain = replace(recipe, layers=(), format=base, embed=tops.pop() if len(tops) == 1 else recipe.embed)
    return replace(with_layers(plain, formats, kinds, base), name=recipe.name)
