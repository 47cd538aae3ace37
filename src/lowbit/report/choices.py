"""The recipes that one model can be recommended: each with its exact sizes and what its format is expected to cost."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.budget.memory import OVERHEAD, Memory, running_memory
from lowbit.calibration.data import SAMPLES
from lowbit.convert.preparing import contents_of, fitted, floats_of, recipe_for
from lowbit.errors import ExportError, LowbitError, RecipeError
from lowbit.interchange.exporters.exporter import Exporter, exporter_named, exporters
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.source import Source
from lowbit.kv.folder import read_cache_format
from lowbit.measure.expected_loss import ExpectedLoss, expected_loss, quantizing_seconds
from lowbit.measure.quality import Estimate
from lowbit.planning.kv_cache import KVCache
from lowbit.planning.plan import Plan, make_plan
from lowbit.recipes.cache_rules import cache_settings
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from lowbit.recipes.rewriting import rewritten

if TYPE_CHECKING:
    from lowbit.interchange.tensors import TensorPlan

OWN = "lowbit"
AS_IT_IS = "as it is"
WITH_TEXT, WITHOUT = "qronos", "search"  # the methods for a format that no preset names
_FEW_BITS = 7  # below so many bits per weight calibration text pays
# In which programs' own names are looked for: presets of this project, and formats that lie between them.
_PRESETS = ("w8", "nl4", "w4", "w3", "w2")
_EVERYDAY = "w4"  # whose refusal is said where a program can hold nothing of a model
_SERVED = ("w8a8", "fp8")  # of programs that multiply in 8 bits
_BETWEEN = ("int5:g32", "int4:g128", "int3:g64", "int2:g64")
_MIXES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "iq4_nl", "q3_k_m", "q2_k")
_SAVED = 0.98  # what is worse is worth naming where it takes at most this share of the bytes


@dataclass(frozen=True)
class Choice:
    """One thing that can be done with a model.

    name      the recipe as it is typed; AS_IT_IS for a model that is quantized already
    recipe    its full text, empty for AS_IT_IS
    command   what makes it
    memory    bytes while it runs; `memory.weights` are those of the weight files
    read      bytes of weights that are read for each new token
    bits      bits per weight in the linear layers
    loss      what it is expected to cost; None for AS_IT_IS
    text      what `--calibration` is given, None for none
    seconds   about how long making it takes on two cores; peak: bytes that it takes there
    measured  its KL divergence, nats per token, on this model, where that was measured
    replaced  what stands in place of formats that do not fit this model's shapes, with the reason of each
    means     whether the name of a preset stands for another recipe in the program that it is for
    """

    name: str
    recipe: str
    command: str
    memory: Memory
    read: int
    bits: float
    loss: ExpectedLoss | None = None
    text: str | None = None
    seconds: float = 0.0
    peak: int = 0
    measured: Estimate | None = None
    replaced: tuple[str, ...] = ()
    means: bool = False

    @property
    def bound(self) -> bool:
        """Whether its loss is a bound by another format's, not a measurement."""
        return self.measured is None and self.loss is not None and self.loss.at_most

    @property
    def kl(self) -> float:
        """Measured where it was, else expected: nats per token. What is left as it is loses nothing."""
        if self.measured is not None:
            return self.measured.value
        return 0.0 if self.loss is None else self.loss.kl

    @property
    def rank(self) -> tuple[float, float, int]:
        """Smaller is better: the loss to two digits, of equal losses the bound with the most bits, then the fewest bytes."""
        rounded = float(f"{self.kl:.1e}") if math.isfinite(self.kl) else math.inf
        return rounded, -self.bits if self.bound else 0.0, self.memory.weights


def choices(
    source: Source, model: Any, target: str, context: int, kv: KVCache, *, text: str | None, samples: int | None = None
) -> list[Choice]:
    """What fits the program `target` and is worth its bytes, the best first; no weight is read.

    kv: the cache of the model. text: what `--calibration` would be given where it pays, None for recipes without. A choice that another beats in
    quality at about as few bytes is left out. ExportError where the program can hold nothing of the model.
    """
    kind = None if target == OWN else _exporter(target)
    found: dict[tuple[str, str | None], Choice] = {}
    refusals: dict[str, LowbitError] = {}
    if kind is None and source.storage != "float":
        as_is = _as_it_is(source, model, context, kv)
        found[as_is.name, None] = as_is
    for name in _names(kind, source, text is not None):
        try:
            choice = _choice(name, kind, source, model, context, kv, text, samples)
        except (ExportError, RecipeError) as error:
            refusals[name] = error
            continue
        if choice is not None:
            found.setdefault((choice.recipe, choice.text), choice)
    if not found:
        raise refusals.get(_EVERYDAY) or RecipeError(
            f"{source.label} has no linear layer to quantize, so there is nothing to recommend"
        )
    ordered = sorted(found.values(), key=lambda c: c.rank)
    kept: list[Choice] = []
    for choice in ordered:
        saved = 1.0 if choice.name in _SERVED else _SAVED
        if all(choice.memory.weights < saved * better.memory.weights for better in kept):
            kept.append(choice)
    return kept


def targets() -> list[str]:
    """The programs that a recipe can be recommended for."""
    return [OWN, *exporters()]


def _exporter(target: str) -> Exporter:
    try:
        return exporter_named(target)
    except ExportError:
        raise RecipeError(f"no recipe can be recommended for {target!r}; known are {', '.join(targets())}") from None


def _names(kind: Exporter | None, source: Source, text: bool) -> Iterator[str]:
    """Recipes as they are typed. What a program has names for, it says itself; what it cannot hold, it refuses later."""
    method = WITH_TEXT if text else WITHOUT
    formats = _BETWEEN if kind is None else kind.candidates(floats_of(source))
    yield from () if kind is None else (mix for mix in _MIXES if mix in kind.mixes())
    yield from _PRESETS
    yield from () if kind is None else _SERVED
    yield from (f"{method}@{fmt}" for fmt in formats)


def _choice(
    name: str, kind: Exporter | None, source: Source, model: Any, context: int, kv: KVCache, text: str | None,
    samples: int | None,
) -> Choice | None:  # fmt: skip
    """What one recipe makes of the model; None where nothing is known of what it costs, or where it is not for this program."""
    looks = text is not None
    plan, weights, replaced = _planned(name, kind, source, context, looks)
    pays = looks and plan.linear_bits_per_weight < _FEW_BITS and plan.recipe.uses_calibration
    if looks and not pays:
        plan, weights, replaced = _planned(name, kind, source, context, False)
    if not pays and plan.recipe.needs_calibration is not None:
        return None
    loss = expected_loss(plan, pays, "" if kind is None else name)
    if loss is None:
        return None
    seconds = quantizing_seconds(plan.parameters, pays, SAMPLES if samples is None else samples, loss)
    return Choice(
        name, str(plan.recipe), _command(model, ",".join([name, *cache_settings(kv.format)]), kind, text if pays else None, samples),
        running_memory(weights, kv, context, working=OVERHEAD if kind is None else 0),  # what others take is not known
        read_bytes(plan, source.config), plan.linear_bits_per_weight, loss, text if pays else None, seconds,
        plan.peak_bytes, replaced=replaced, means=kind is not None and name in PRESETS and name in kind.recipes,
    )  # fmt: skip


def _planned(
    name: str, kind: Exporter | None, source: Source, context: int, looks: bool
) -> tuple[Plan, int, tuple[str, ...]]:
    """(the plan of a recipe, exact bytes of its weight files, what stands in place of what does not fit). looks: whether calibration text is at hand."""
    if kind is None:
        wanted = Recipe.parse(name).calibrated() if looks else Recipe.parse(name)
        plan = make_plan(rewritten(source, wanted), wanted, context=context)
        return plan, plan.output_bytes, ()
    wanted = recipe_for(kind, name, source, looks)
    apart = rewritten(source, wanted)
    plan, changes = fitted(kind, make_plan(apart, wanted, context=context), apart)
    return plan, kind.weight_bytes(contents_of(plan, source)), tuple(changes)


def _command(model: Any, name: str, kind: Exporter | None, text: str | None, samples: int | None) -> str:
    if not isinstance(model, (str, Path)):  # a module, which no command can name
        said = ", effort='none'" if text is None and Recipe.parse(name).has_calibrated_form else ""
        said = said if text is None else f", calibration={text!r}" + ("" if samples is None else f", samples={samples}")
        return f"lowbit.quantize(model, {name!r}{said})"
    words = ["lowbit", "quantize", str(model), name]
    words += [] if kind is None else ["--as", kind.name]
    if text is not None:
        words += ["--calibration", text]
    elif Recipe.parse(name).has_calibrated_form if name.partition(",")[0] in PRESETS else kind is not None:
        words += ["--data-free"]  # what it would do with text is another choice
    words += [] if text is None or samples is None else ["--samples", str(samples)]
    return shlex.join(words)


def _as_it_is(source: Source, model: Any, context: int, kv: KVCache) -> Choice:
    """A source that is quantized already: lowbit's own folder is run, another's becomes one with the same integers."""
    plan = make_plan(source, Recipe.parse("w8"), context=context)
    weights = source.disk_bytes()
    ours = isinstance(model, (str, Path)) and is_ours(Path(model))
    command = (
        ["lowbit", "chat" if kv.bytes_at(1) else "inspect", str(model)] if ours else ["lowbit", "import", str(model)]
    )
    read = int(weights * read_share(plan.tensors, source.config))
    own = read_cache_format(Path(str(model))) if ours else None  # what was asked for is of a new folder
    memory = running_memory(weights, kv.stored(own), context)
    return Choice(AS_IT_IS, "", shlex.join(command), memory, read, 8 * weights / max(1, plan.parameters))


def read_bytes(plan: Plan, config: Any) -> int:
    """Bytes of weights that one new token reads: of experts the chosen ones, of an embedding that is no head a row."""
    return int(sum(_share(t, plan, config) * t.bytes_after for t in plan.tensors))


def read_share(tensors: tuple[TensorPlan, ...], config: Any) -> float:
    """The share of the parameters that one new token reads."""
    chosen = active_experts(config)
    return sum((chosen if t.kind == "experts" else 1.0) * t.count for t in tensors) / max(
        1, sum(t.count for t in tensors)
    )


def _share(t: TensorPlan, plan: Plan, config: Any) -> float:
    if t.kind == "embedding" and t.name not in plan.tied.values():
        return 1 / max(1, t.shape[0])
    return active_experts(config) if t.kind == "experts" else 1.0


def active_experts(config: Any) -> float:
    """The share of a layer's experts that one token is given to; 1 where the config does not say."""
    text = text_config(config)
    chosen = _first(text, "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "top_k_experts")
    whole = _first(text, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    return chosen / whole if chosen and whole and chosen <= whole else 1.0


def _first(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), 0)
