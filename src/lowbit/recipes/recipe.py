"""Recipe: what to do with a model, as a value. Text, Python and TOML are forms of the same thing.

METHOD[(OPTION=VALUE,...)][+METHOD...]@FORMAT[,KEY=VALUE...]

absmax@int8:channel                 a fit; the solver is round-to-nearest
gptq@int4:g32                       a solver that looks at calibration text
guided+gptq@int4:g32                tokens count by their gradients
gptq+distill@int4:g32               and a tuner of what is stored, after it
rotate+awq+gptq@int4:g64            transforms of the model first, in this order
smooth@int8:channel,a=int8:token    the inputs of linear layers in few bits too
...,a=minmax@int8:tensor,a:*.down_proj=int8:g64,fallback=never      those of single layers: see `activation_rules.py`
kmeans@kmeans4:channel              a solver
hqq+rtn@uint4:g64:zero=fp16         both
int4:g32                            a format alone: the best data-free fit and solver for it
search@int4:g32,embed=int6:g64      embeddings and heads in another format (int8:channel otherwise)
search@int4:g32,*.down_proj=int8:channel,*.layers.0.*=keep      per layer, the last match wins
w4,kv=int4:g32                      and the KV cache of the result, k= and v= apart: see `cache_rules.py`
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from pathlib import Path

from lowbit.display import Displayed
from lowbit.errors import RecipeError
from lowbit.formats import Format, parse_format
from lowbit.formats.inputs import Inputs
from lowbit.recipes.activation_rules import FALLBACK, NEVER, Fallback, InputRule
from lowbit.recipes.cache_rules import RecipeCache, cache_settings
from lowbit.recipes.presets import PRESETS
from lowbit.solvers import Call
from lowbit.solvers.ranges.estimator import RangeMethod
from lowbit.solvers.registry import announce
from lowbit.transforms.registry import FACTS, check_order
from lowbit.tuning.registry import SCOPES, Scope

KEEP = "keep"
EMBED = parse_format("int8:channel")
announce("lowbit.transforms")
announce("lowbit.tuning")
announce("lowbit.blockwise.weightings")


@dataclass(frozen=True, repr=False)
class Recipe(Displayed):
    """Transforms in order, one fit, one solver, a tuner, formats by layer, and how inputs of linear layers are stored.

    `fit` and `solver` may be None: the best data-free one for each format is then taken (`fit_for`,
    `solver_for`). `embed` is the format of embeddings and of output heads, or None to keep them.
    `layers` are (glob over parameter names, format or None to keep), the last match wins.
    `weighting` says how much each token counts in the statistics; None: all the same.
    `tuner` moves what the solver stored by gradient descent, or None.
    `inputs` (`a=`) are those of linear layers; static ones take their range from the estimator `range`.
    `layer_inputs` (`a:GLOB=`) are those of single layers, the last match wins. `fallback`: what static inputs of `a=`
    become where their range explodes on the calibration text, None for never.
    `cache` (`kv=`) is how the result stores its KV cache where nobody says otherwise, None where the recipe says nothing of it.
    It changes no weight, so a preset with it keeps its name.
    """

    format: Format
    fit: Call | None = None
    solver: Call | None = None
    embed: Format | None = EMBED
    layers: tuple[tuple[str, Format | None], ...] = ()
    name: str | None = None
    transforms: tuple[Call, ...] = ()
    inputs: Inputs | None = None
    range: RangeMethod | None = None
    tuner: Call | None = None
    weighting: Call | None = None
    layer_inputs: tuple[tuple[str, InputRule], ...] = ()
    fallback: Fallback | None = FALLBACK
    cache: RecipeCache | None = None

    def _brief(self) -> str:
        return repr(self.title)

    def __post_init__(self) -> None:
        check_order([call.name for call in self.transforms])
        if self.inputs is not None and self.inputs.static and self.range is None:
            object.__setattr__(self, "range", RangeMethod("minmax"))
        if self.fit is None and self.solver is None and str(self.format) in PRESETS:
            object.__setattr__(self, "fit", Call("search"))  # mxfp4 and nvfp4 are presets too, with fits of their own
        for call in (self.fit, self.solver):
            reason = call.method.declines(self.format) if call is not None else None
            if reason is not None:
                raise RecipeError(f"{call.name!r} {reason}")  # type: ignore[union-attr]
        if self.fallback != FALLBACK and not (self.inputs is not None and self.inputs.static):
            raise RecipeError(
                f"fallback={self.fallback or NEVER} is for static inputs, and this recipe has none for all layers; "
                "add a=minmax@int8:tensor, or leave it out"
            )

    def format_for(self, name: str, kind: str) -> Format | None:
        """The format of a parameter (`kind` as in the inventory), or None to keep it."""
        chosen = self.embed if kind in ("embedding", "head") else self.format
        for pattern, fmt in self.layers:
            if self.matches(pattern, name):
                chosen = fmt
        return chosen

    @staticmethod
    def matches(pattern: str, name: str) -> bool:
        """Whether a layer glob means this parameter; `.weight` at the end may be left out."""
        return any(fnmatch.fnmatchcase(n, pattern) for n in (name, name.removesuffix(".weight")))

    def keeps_by_name(self, name: str) -> bool:
        """Whether the recipe says of this very tensor, not of a glob, that it is kept."""
        said = [fmt for pattern, fmt in self.layers if pattern in (name, name.removesuffix(".weight"))]
        return bool(said) and said[-1] is None

    def rule_for(self, name: str) -> InputRule:
        """How the inputs of a parameter of a linear layer are stored, and what finds their range."""
        chosen = InputRule(self.inputs, self.range)
        for pattern, rule in self.layer_inputs:
            if self.matches(pattern, name):
                chosen = rule
        return chosen

    @property
    def rules(self) -> tuple[InputRule, ...]:
        """Of all layers, then of single ones."""
        return InputRule(self.inputs, self.range), *(rule for _, rule in self.layer_inputs)

    @property
    def stores_inputs(self) -> bool:
        """Whether the inputs of any layer are in few bits."""
        return any(rule.inputs is not None for rule in self.rules)

    def fit_for(self, fmt: Format) -> Call:
        """The recipe's fit, or where that cannot serve a format of embeddings or single layers the best for it."""
        if self.fit is not None and self.fit.method.declines(fmt) is None:
            return self.fit
        return Call("search")

    def solver_for(self, fmt: Format, with_stats: bool = False) -> Call:
        """The recipe's solver where it serves the format; k-means for learned codebooks, else round-to-nearest.

        Without statistics of the input (`with_stats`) a solver that needs them does not serve.
        """
        own = self.solver
        if own is not None and own.method.declines(fmt) is None and (with_stats or own.method.needs == "nothing"):
            return own
        return Call("rtn" if fmt.codebook is None else "kmeans")

    def tuner_of(self, scope: Scope) -> Call | None:
        """The recipe's tuner if it works on this much of the model at once."""
        return self.tuner if self.tuner is not None and SCOPES[self.tuner.name] == scope else None

    @property
    def needs_calibration(self) -> str | None:
        """Which part of the recipe looks at calibration text, or None."""
        if self.solver is not None and self.solver.method.needs != "nothing":
            return self.solver.name
        for other in (self.weighting, self.tuner):
            if other is not None:
                return other.name
        for call in self.transforms:
            if FACTS[call.name].kind == "group":
                return call.name
        return next((f"a={rule}" for rule in self.rules if rule.inputs is not None and rule.inputs.static), None)

    def weighs(self, fmt: Format) -> bool:
        """Whether statistics of its input change what becomes of a weight in this format."""
        solver = self.solver_for(fmt, with_stats=True).method
        by_fit = fmt.scale is not None and self.fit_for(fmt).method.weighs
        return solver.needs != "nothing" or solver.weighs or by_fit

    @property
    def uses_calibration(self) -> bool:
        """Whether calibration text changes the result: it is needed, or a weight of some layer is weighed by it."""
        formats = (self.format, *(fmt for _, fmt in self.layers if fmt is not None))
        return self.needs_calibration is not None or any(self.weighs(fmt) for fmt in formats)

    @property
    def has_calibrated_form(self) -> bool:
        """Whether its name leaves open whether codes are found with text. One whose form with text also trains, such as zeroquant,
        takes that only where text is given."""
        return self.calibrated() != self and self.calibrated().tuner is None

    def calibrated(self) -> Recipe:
        """What a preset stands for when calibration text is at hand; the recipe itself otherwise."""
        preset = PRESETS.get(self.name or "")
        if preset is None or preset.calibrated is None:
            return self
        return replace(Recipe.parse(preset.calibrated), name=self.name, cache=self.cache)

    def __str__(self) -> str:
        """The full text; `Recipe.parse(str(r)) == r` but for the name."""
        steps = [
            str(call)
            for call in (*self.transforms, self.weighting, self.fit, self.solver, self.tuner)
            if call is not None
        ]
        text = f"{'+'.join(steps)}@{self.format}" if steps else str(self.format)
        if self.embed != EMBED:
            text += f",embed={format_text(self.embed)}"
        if self.inputs is not None:
            text += f",a={InputRule(self.inputs, self.range)}"
        if self.fallback != FALLBACK:
            text += f",fallback={self.fallback or NEVER}"
        for pattern, rule in self.layer_inputs:
            text += f",a:{pattern}={rule}"
        for pattern, fmt in self.layers:
            text += f",{pattern}={format_text(fmt)}"
        return ",".join([text, *cache_settings(self.cache)])

    @property
    def called(self) -> str | None:
        """The name of a preset, with what is said of the cache beside it: `w4,kv=int8`. None for a recipe without a name."""
        return None if self.name is None else ",".join([self.name, *cache_settings(self.cache)])

    @property
    def title(self) -> str:
        """`name = text` for a preset, the text otherwise."""
        return f"{self.called} = {self}" if self.name else str(self)

    @staticmethod
    def parse(text: str) -> Recipe:
        """A preset name, a format, a composition, or the path of a TOML file."""
        from lowbit.recipes.text import parse_recipe

        return parse_recipe(text)

    @staticmethod
    def of(value: str | Path | Format | Recipe) -> Recipe:
        """A recipe from any of its forms."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Format):
            return Recipe(value)
        return Recipe.parse(str(value))


def format_text(fmt: Format | None) -> str:
    """A format as recipes write it; None is `keep`."""
    return KEEP if fmt is None else str(fmt)
