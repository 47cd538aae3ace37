"""prepare_qat: a float model becomes one that computes with rounded weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.errors import RecipeError, SourceError, nearest
from lowbit.formats import Format
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.module import ModuleSource
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.pipeline.api import quantize
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import rewritten
from lowbit.training.attaching import INPUTS, MARK, QUANTIZER, Attached, Words, attach, prepared, weight_of
from lowbit.training.input_quantizer import Ranges, TrainedInputs
from lowbit.training.starting import Start, Weight, is_packed
from lowbit.training.weight_quantizer import Scales, weight_quantizer
from lowbit.weights.solve import solve

_SCALES = ("learned", "recomputed", "fixed")
_RANGES = ("lsq", "pact", "fixed")


def prepare_qat(
    model: str | Path | nn.Module,
    recipe: str | Format | Recipe | None = None,
    *,
    start: Any = None,
    scales: Scales = "learned",
    ranges: Ranges | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    samples: int | None = None,
    length: int | None = None,
) -> nn.Module:
    """Make a model for quantization-aware training: it computes with weights and inputs that are rounded as `lowbit.quantize`
    stores them, and gradients pass the rounding. `lowbit.convert` makes the packed model of it.

    model: a module, which is changed in place and returned, or a name or folder that is loaded in float32. A recipe that
    rotates or otherwise transforms the model gives a new module, and so does a model that is quantized already. Parameters keep their
    names, so optimizers, `Trainer` and checkpoints work as for the float model; scales that are learned are further parameters. The folder of
    a checkpoint of this training goes on with its scales.
    recipe: any that `lowbit.quantize` takes; a name such as "w4" (the default) without text is its data-free form.

    start: what to start from: None for the fit of the recipe, or a folder that lowbit wrote, a packed model, or what `lowbit.quantize` returned,
    whose codes, scales and ranges are then the first ones. `calibration` (with `samples` windows of `length` tokens, as in
    `lowbit.quantize`) quantizes with that text first and starts there; a recipe that needs text does so without being asked. A model whose weights are
    random starts from the fit of these.

    scales: "learned" (LSQ, Esser et al. 2020): scales, minima and levels of codebooks are parameters; "recomputed": the fit of
    the recipe finds them again at every step, as BitNet does; "fixed": they stay as they start.
    ranges: of static inputs, "lsq" (the default) or "pact" (Choi et al. 2018) to learn them, or "fixed".

    RecipeError for options that contradict each other or would be ignored.

    >>> student = lowbit.prepare_qat(model, "int4:g32")
    >>> loss = student(input_ids=torch.tensor([[1, 5, 9]]), labels=torch.tensor([[1, 5, 9]])).loss
    >>> loss.backward()
    >>> student.model.layers[0].mlp.up_proj.weight.grad.shape
    torch.Size([64, 32])
    """
    _check_choice("scales", scales, _SCALES)
    _check_choice("ranges", ranges, (None, *_RANGES))
    if isinstance(model, nn.Module) and prepared(model) is not None:
        raise RecipeError(f"{type(model).__name__} is prepared for training already; convert it first")
    text = {"calibration": calibration, "samples": samples, "length": length}
    text = {name: value for name, value in text.items() if value is not None}
    if is_packed(model):
        if start is not None:
            raise RecipeError(
                "the model is quantized already and is its own start; leave start out, or give the float model"
            )
        start, model = model, None  # type: ignore[assignment]
    wanted = None if recipe is None and start is not None else Recipe.of("w4" if recipe is None else recipe)
    if start is not None:
        if text:
            raise RecipeError(
                f"{' and '.join(text)} would be ignored, as the start is quantized already; leave them out"
            )
        if scales == "recomputed":
            raise RecipeError("scales='recomputed' would ignore those of the start; use 'learned' or 'fixed'")
        ready = _from_start(model, wanted, Start.of(start))
    else:
        assert wanted is not None
        ready = _fresh(model, wanted, scales, tokenizer, text)
    plan, found = ready.plan, ready.weights
    if not found:
        raise RecipeError(f"nothing in {plan.label} can be quantized by {plan.recipe}: every tensor is kept")
    if ranges is not None and not any(w.inputs is not None and w.inputs.static for w in found.values()):
        raise RecipeError(f"ranges={ranges!r} is for static inputs, and {plan.recipe} has none; leave it out")
    made = _attached(ready, scales, ranges or "lsq", Words(tokenizer, _places(model, start)))
    if ready.source is not None:
        _go_on(made, ready.source, plan.recipe)
    return made


def _places(*values: Any) -> tuple[str, ...]:
    """Those that are folders or names, folders by their full path."""
    named = [str(value) for value in values if isinstance(value, (str, Path))]
    return tuple(str(Path(name).resolve()) if Path(name).exists() else name for name in named)


@dataclass(frozen=True)
class _Ready:
    """A float model, what becomes of its tensors, how its weights start, and the files that it was read from."""

    module: nn.Module
    plan: Plan
    weights: dict[str, Weight]
    source: Source | None = None


@torch.no_grad()
def _go_on(module: nn.Module, source: Source, recipe: Recipe) -> None:
    """What a checkpoint of this training has beside the float weights. SourceError where it was trained with another recipe."""
    state = module.state_dict(keep_vars=True)
    of_training = [name for name in source.extra if any(mark in name for mark in (QUANTIZER, INPUTS + "."))]
    if of_training and recipe.transforms:
        raise SourceError(
            f"{source.label} is a checkpoint of training, and {recipe} would transform it once more; prepare the model that "
            "training began with, and load the checkpoint into it"
        )
    for name in of_training:
        if name not in state or state[name].shape != source.spec(name).shape:
            raise SourceError(
                f"{source.label} is a checkpoint of training by another recipe or other options: {name!r} does not fit; give the "
                "recipe, scales and ranges that it was trained with"
            )
        state[name].copy_(source.read(name))


def _check_choice(what: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        names = [name for name in known if name is not None]
        raise RecipeError(f"{what}={value!r} is not known{nearest(str(value), names)} (known: {', '.join(names)})")


def _fresh(
    model: str | Path | nn.Module, wanted: Recipe, scales: Scales, tokenizer: Any, text: dict[str, Any]
) -> _Ready:
    """From a float model, by the fit of each weight or, where there is text, by all that the recipe does."""
    if not text and wanted.needs_calibration is None:
        source = open_source(model, tokenizer=tokenizer)
        changed = rewritten(source, wanted)
        plan = make_plan(changed, wanted)
        module = model if changed is source and isinstance(model, nn.Module) else _trainable(changed)
        weights = {t.name: _fitted(module, t, wanted) for t in plan.tensors if t.format is not None}
        return _Ready(module, plan, weights, None if isinstance(model, nn.Module) else source)
    static = any(rule.inputs is not None and rule.inputs.static for rule in wanted.rules)
    by_text = wanted.transforms or (wanted.solver is not None and wanted.solver.method.needs != "nothing")
    if scales == "recomputed" and (by_text or wanted.tuner is not None or not static):
        raise RecipeError(
            f"scales='recomputed' fits each weight on its own at every step, and would ignore what {wanted} does with text; "
            "use 'learned' or 'fixed'"
        )
    done = quantize(model, wanted, tokenizer=tokenizer, **text)
    first = Start.of(done)
    if scales == "recomputed":  # of the text come the ranges of inputs alone
        module = model if isinstance(model, nn.Module) else _trainable(open_source(model, tokenizer=tokenizer))
        return _Ready(module, _planned(module, first, wanted, tokenizer), first.weights)
    return _from_start(model, None, first)


def _from_start(model: str | Path | nn.Module | None, wanted: Recipe | None, first: Start) -> _Ready:
    """From a quantized model, with the float one where its weights are still those that were rounded."""
    if model is None or first.recipe.transforms:
        module = first.dense()
    else:
        module = model if isinstance(model, nn.Module) else _trainable(open_source(model))
        first.put_into(module)
    plan = _planned(module, first, first.recipe)
    for t in make_plan(ModuleSource(module), wanted).tensors if wanted is not None else ():
        own = first.weights.get(t.name)
        if (own and own.q.format.plain) != (t.format and t.format.plain):
            raise RecipeError(
                f"the start has {t.name!r} in {own.q.format if own else 'float'}, and {wanted} asks for "
                f"{t.format or 'float'}; leave the recipe out, or the start"
            )
    return _Ready(module, plan, first.weights)


def _planned(module: nn.Module, first: Start, recipe: Recipe, tokenizer: Any = None) -> Plan:
    """The plan of a module whose formats are those of a start."""
    plan = make_plan(ModuleSource(module, tokenizer), recipe)
    return replace(plan, tensors=tuple(as_started(t, first.weights.get(t.name)) for t in plan.tensors))


def as_started(t: TensorPlan, own: Weight | None) -> TensorPlan:
    """A planned tensor in the format that it has already; kept where it has none."""
    if own is None:
        return replace(t, format=None, inputs=None, keep=t.keep or "kept by the recipe")
    return replace(t, format=own.q.format.plain, inputs=own.inputs, keep=None)


def _trainable(source: Source) -> nn.Module:
    """The float model of a source in float32, all of it trainable."""
    module = source.load_float(torch.float32)
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def _fitted(module: nn.Module, t: TensorPlan, recipe: Recipe) -> Weight:
    """A weight by the recipe without text. WeightError, which names it, for values that are not finite."""
    weight = weight_of(module, t.name).detach()
    q = solve(t, weight, recipe).qtensor()
    assert q is not None
    ones = {part: torch.ones(size) for part, (_, size) in t.input_parts().items()}
    return Weight(q.to(weight.device), t.inputs, ones, t.transposed)


def _attached(ready: _Ready, scales: Scales, ranges: Ranges, words: Words) -> nn.Module:
    module, plan = ready.module, ready.plan
    plans = {t.name: t for t in plan.tensors if t.format is not None}
    for name, t in plans.items():
        weight, aliases = ready.weights[name], [alias for alias, owner in plan.tied.items() if owner == name]
        quantizer = weight_quantizer(weight.q, t, plan.recipe, scales)
        inputs = None
        if weight.inputs is not None:
            inputs = TrainedInputs(weight.inputs, t.stored_shape[-1], weight.input_parts, ranges)
        device = weight_of(module, name).device
        attach(module, name, aliases, quantizer.to(device), inputs if inputs is None else inputs.to(device))
    module.__dict__[MARK] = Attached(plan.recipe, f"scales {scales}", plans, words)
    return module
