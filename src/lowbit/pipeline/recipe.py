"""Recipe: what to do with a model, as a value. Text, Python and TOML are forms of the same thing.

METHOD[(OPTION=VALUE,...)][+METHOD...]@FORMAT[,KEY=VALUE...]

absmax@int8:channel                 a fit; the solver is round-to-nearest
gptq@int4:g32                       a solver that looks at calibration text
gptq+distill@int4:g32               and a tuner of what is stored, after it
rotate+awq+gptq@int4:g64            transforms of the model first, in this order
smooth@int8:channel,a=int8:token    the inputs of linear layers in few bits too
kmeans@kmeans4:channel              a solver
hqq+rtn@uint4:g64:zero=fp16         both
int4:g32                            a format alone: the best data-free fit and solver for it
search@int4:g32,embed=int6:g64      embeddings and heads in another format (int8:channel otherwise)
search@int4:g32,*.down_proj=int8:channel,*.layers.0.*=keep      per layer, the last match wins
"""

from __future__ import annotations

import fnmatch
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, RecipeError, nearest
from lowbit.formats import Format, parse_format
from lowbit.formats.inputs import Inputs, parse_inputs
from lowbit.pipeline.presets import PRESETS
from lowbit.solvers import Call
from lowbit.solvers.ranges.estimator import RangeMethod
from lowbit.solvers.registry import announce, methods
from lowbit.transforms.registry import FACTS, check_order
from lowbit.tuning.registry import SCOPES, Scope

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEEP = "keep"
EMBED = parse_format("int8:channel")
# Keys of the text form that are known but stand for something this version does not do.
_LATER = {"kv": "KV-cache formats"}
announce("lowbit.transforms")
announce("lowbit.tuning")


@dataclass(frozen=True)
class Recipe:
    """Transforms in order, one fit, one solver, a tuner, formats by layer, and how inputs of linear layers are stored.

    `fit` and `solver` may be None: the best data-free one for each format is then taken (`fit_for`,
    `solver_for`). `embed` is the format of embeddings and of output heads, or None to keep them.
    `layers` are (glob over parameter names, format or None to keep), the last match wins.
    `tuner` moves what the solver stored by gradient descent, or None.
    `inputs` (`a=`) are those of linear layers; static ones take their range from the estimator `range`.
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
        if self.tuner is not None:
            return self.tuner.name
        for call in self.transforms:
            if FACTS[call.name].kind == "group":
                return call.name
        return f"a={self.inputs}" if self.inputs is not None and self.inputs.static else None

    @property
    def uses_calibration(self) -> bool:
        """Whether calibration text changes the result: it is needed, or the fit weighs errors by it."""
        weighs = self.fit is None or self.fit.name in ("search", "mse", "hqq")
        return (
            self.needs_calibration is not None or weighs or (self.solver is not None and self.solver.name == "kmeans")
        )

    def calibrated(self) -> Recipe:
        """What a preset stands for when calibration text is at hand; the recipe itself otherwise."""
        preset = PRESETS.get(self.name or "")
        if preset is None or preset.calibrated is None:
            return self
        return replace(Recipe.parse(preset.calibrated), name=self.name)

    def __str__(self) -> str:
        """The full text; `Recipe.parse(str(r)) == r` but for the name."""
        steps = [str(call) for call in (*self.transforms, self.fit, self.solver, self.tuner) if call is not None]
        text = f"{'+'.join(steps)}@{self.format}" if steps else str(self.format)
        if self.embed != EMBED:
            text += f",embed={_text(self.embed)}"
        if self.inputs is not None:
            text += f",a={self.inputs_text}"
        for pattern, fmt in self.layers:
            text += f",{pattern}={_text(fmt)}"
        return text

    @property
    def inputs_text(self) -> str:
        """As after `a=`: the estimator of a static range, then the format."""
        if self.range is None or (self.range == RangeMethod("minmax")):
            return str(self.inputs)
        return f"{self.range}@{self.inputs}"

    @property
    def title(self) -> str:
        """`name = text` for a preset, the text otherwise."""
        return f"{self.name} = {self}" if self.name else str(self)

    @staticmethod
    def parse(text: str) -> Recipe:
        """A preset name, a format, a composition, or the path of a TOML file."""
        if text.endswith(".toml"):
            return _from_toml(Path(text))
        head, *settings = _split(text.strip(), ",")
        if head in PRESETS:
            recipe = replace(Recipe.parse(PRESETS[head].text), name=head)
            return replace(_with_settings(recipe, settings, text), name=None if settings else head)
        steps, at, fmt = head.rpartition("@")
        if not at and _looks_like_name(head):
            known = list(dict.fromkeys([*PRESETS, *methods()]))
            if head in methods():
                raise RecipeError(f"method {head!r} needs a format: write {head}@int4:g32, for example")
            raise RecipeError(f"unknown recipe {head!r}{nearest(head, known)} (presets: {', '.join(PRESETS)})")
        return _with_settings(_with_steps(Recipe(parse_format(fmt)), _split(steps, "+") if at else []), settings, text)

    @staticmethod
    def of(value: str | Path | Format | Recipe) -> Recipe:
        """A recipe from any of its forms."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Format):
            return Recipe(value)
        return Recipe.parse(str(value))


def _with_steps(recipe: Recipe, steps: list[str]) -> Recipe:
    fit: Call | None = None
    solver: Call | None = None
    tuner: Call | None = None
    transforms: list[Call] = []
    for step in steps:
        call = _parse_call(step)
        if tuner is not None:
            raise RecipeError(f"{call.name!r} after {tuner.name!r}: a recipe has one tuner, and it comes last")
        if call.method.kind == "transform":
            if fit is not None or solver is not None:
                first = fit or solver
                raise RecipeError(
                    f"{call.name!r} after {first}: transforms rewrite the model first; write {call}+{first}"
                )
            transforms.append(call)
        elif call.method.kind == "fit":
            if fit is not None or solver is not None:
                first = fit or solver
                raise RecipeError(f"{call.name!r} after {first}: a recipe has one fit, and it comes before the solver")
            fit = call
        elif call.method.kind == "tuner":
            tuner = call
        else:
            if solver is not None:
                raise RecipeError(f"{call.name!r} after {solver.name!r}: a recipe has one solver")
            solver = call
    return replace(recipe, fit=fit, solver=solver, transforms=tuple(transforms), tuner=tuner)


def _with_settings(recipe: Recipe, settings: list[str], whole: str) -> Recipe:
    for setting in settings:
        key, equals, value = setting.strip().partition("=")
        if not equals or not value:
            raise RecipeError(f"{setting!r} in recipe {whole!r} is not KEY=VALUE, such as embed=int8:channel")
        if key in _LATER:
            raise RecipeError(f"{setting!r}: this version of lowbit has no {_LATER[key]}; leave it out")
        if key == "a":
            recipe = _with_inputs(recipe, value)
            continue
        is_glob = any(char in key for char in "*?[.") or key == "lm_head" or (value == KEEP and key != "embed")
        if key != "embed" and not is_glob:
            raise RecipeError(
                f"unknown option {key!r} in recipe {whole!r}{nearest(key, ['embed', 'a'])} "
                "(known: embed=FORMAT, a=FORMAT for the inputs of linear layers, and layer globs such as *.down_proj=FORMAT or lm_head=keep)"
            )
        fmt = _layer_format(value)
        recipe = replace(recipe, layers=(*recipe.layers, (key, fmt))) if is_glob else replace(recipe, embed=fmt)
    return recipe


def _with_inputs(recipe: Recipe, value: str) -> Recipe:
    """`a=int8:token`, or with the estimator of a static range in front: `a=percentile(p=99.9)@int8:tensor`."""
    head, at, text = value.rpartition("@")
    inputs = parse_inputs(text)
    if not at:
        return replace(recipe, inputs=inputs, range=None)
    name, options = _call_parts(head)
    numbers = tuple((k, v) for k, v in options if not isinstance(v, str))
    if len(numbers) < len(options):
        raise RecipeError(f"the options of {name!r} are numbers: {head!r}")
    if not inputs.static:
        inputs = replace(inputs, static=True)
    return replace(recipe, inputs=inputs, range=RangeMethod(name, numbers))


def _from_toml(path: Path) -> Recipe:
    """recipe = "search@int4:g32", and optionally embed = "...", [layers] with "glob" = "format or keep"."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {str(path)!r} is not TOML: {error}") from None
    allowed = ("recipe", "embed", "layers")
    for key in table:
        if key not in allowed:
            raise RecipeError(f"recipe file {str(path)!r} has an unknown key {key!r}{nearest(key, allowed)}")
    text = table.get("recipe")
    if not isinstance(text, str) or text.endswith(".toml"):
        raise RecipeError(f'recipe file {str(path)!r} needs a line such as recipe = "search@int4:g32"')
    layers = table.get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(v, str) for v in layers.values()):
        raise RecipeError(f'[layers] in {str(path)!r} is a table of "glob" = "format"')
    recipe = Recipe.parse(text)
    if "embed" in table:
        recipe = replace(_with_settings(recipe, [f"embed={table['embed']}"], str(path)), name=None)
    if layers:
        recipe = replace(
            recipe, layers=(*recipe.layers, *((g, _layer_format(v)) for g, v in layers.items())), name=None
        )
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The TOML form; reading it gives the recipe back."""
    plain = replace(recipe, embed=EMBED, layers=())
    lines = [f'recipe = "{plain}"', f'embed = "{_text(recipe.embed)}"']
    if recipe.layers:
        lines += ["", "[layers]", *(f'{json.dumps(pattern)} = "{_text(fmt)}"' for pattern, fmt in recipe.layers)]
    return "\n".join(lines) + "\n"


def _parse_call(text: str) -> Call:
    return Call(*_call_parts(text))


def _call_parts(text: str) -> tuple[str, tuple[tuple[str, float | int | str], ...]]:
    """Name and options of `name(option=value,...)`."""
    name, opened, rest = text.strip().partition("(")
    if not opened:
        return name, ()
    if not rest.endswith(")"):
        raise RecipeError(f"{text!r} opens a '(' that it does not close")
    options: list[tuple[str, Any]] = []
    for item in filter(None, rest[:-1].split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise RecipeError(f"{item!r} in {text!r} is not OPTION=VALUE")
        options.append((key.strip(), _number(value.strip())))
    return name, tuple(options)


def _number(value: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _split(text: str, separator: str) -> list[str]:
    """The parts between separators outside parentheses."""
    parts, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char == separator and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [*parts, text[begin:]]


def _looks_like_name(text: str) -> bool:
    """Whether a word without '@' is meant as a preset rather than as a format."""
    try:
        parse_format(text)
    except LowbitError:
        return ":" not in text
    return False


def _layer_format(value: str) -> Format | None:
    return None if value == KEEP else parse_format(value)


def _text(fmt: Format | None) -> str:
    return KEEP if fmt is None else str(fmt)
