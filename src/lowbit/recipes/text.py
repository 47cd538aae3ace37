"""Recipes as text and as TOML: see `recipe.py` for the grammar."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, RecipeError, nearest
from lowbit.formats import Format, parse_format
from lowbit.recipes.activation_rules import parse_fallback, parse_rule
from lowbit.recipes.cache_rules import CACHE_KEYS, cache_settings, is_cache_key, parse_cache
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import EMBED, KEEP, Recipe, format_text
from lowbit.recipes.spelling import accepted, instead
from lowbit.solvers import Call
from lowbit.solvers.calls import call_parts
from lowbit.solvers.registry import methods

_OF_INPUTS = ("a", "fallback")  # keys of the text form for the inputs of linear layers
_TABLES = ("layers", "inputs")  # of the TOML form, by glob
_CACHE = "cache"  # a table of the TOML form, or a text


def parse_recipe(text: str) -> Recipe:
    """A preset name, a format, a composition, or the path of a TOML file."""
    if text.endswith(".toml"):
        return _from_toml(Path(text))
    head, *settings = _split(text.strip(), ",")
    head = accepted(head)
    if head in PRESETS:
        recipe = replace(parse_recipe(PRESETS[head].text), name=head)
        # What is said of the cache leaves the weights as the name has them.
        named = all(is_cache_key(setting.strip().partition("=")[0]) for setting in settings)
        return replace(_with_settings(recipe, settings, text), name=head if named else None)
    try:
        recipe = _composed(head)
    except LowbitError:
        said = instead(head, parse_recipe)
        if said is None:
            raise
        raise RecipeError(said) from None
    return _with_settings(recipe, settings, text)


def _composed(head: str) -> Recipe:
    """A format, or steps and a format."""
    steps, at, fmt = head.rpartition("@")
    if not at and _looks_like_name(head):
        known = list(dict.fromkeys([*PRESETS, *methods()]))
        if head in methods():
            raise RecipeError(f"method {head!r} needs a format: write {head}@int4:g32, for example")
        hint = nearest(head, known)
        every = "`lowbit recipes` lists them all" if hint else f"presets: {', '.join(PRESETS)}"
        raise RecipeError(f"unknown recipe {head!r}{hint} ({every})")
    return _with_steps(Recipe(parse_format(fmt)), _split(steps, "+") if at else [])


def _with_steps(recipe: Recipe, steps: list[str]) -> Recipe:
    fit: Call | None = None
    solver: Call | None = None
    tuner: Call | None = None
    weighting: Call | None = None
    transforms: list[Call] = []
    for step in steps:
        call = _parse_call(step)
        if tuner is not None:
            raise RecipeError(
                f"{call.name!r} after {tuner.name!r}: a recipe has one tuner, a step that trains what is stored, and it comes last"
            )
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
                raise RecipeError(
                    f"{call.name!r} after {first}: a recipe has one fit, the step that finds scales, and it comes before the step that rounds"
                )
            fit = call
        elif call.method.kind == "weighting":
            if fit is not None or solver is not None or weighting is not None:
                before = weighting or fit or solver
                raise RecipeError(
                    f"{call.name!r} after {before}: it says how much tokens count in the steps that follow, so write it first"
                )
            weighting = call
        elif call.method.kind == "tuner":
            tuner = call
        else:
            if solver is not None:
                raise RecipeError(
                    f"{call.name!r} after {solver.name!r}: a recipe has one solver, the step that rounds; leave one out"
                )
            solver = call
    return replace(recipe, fit=fit, solver=solver, transforms=tuple(transforms), tuner=tuner, weighting=weighting)


def _with_settings(recipe: Recipe, settings: list[str], whole: str) -> Recipe:
    cache = list[str]()
    # A fallback is for the static inputs that another setting names, wherever that stands.
    for setting in sorted(settings, key=lambda s: s.strip().startswith("fallback=")):
        key, equals, value = setting.strip().partition("=")
        if not equals or not value:
            raise RecipeError(f"{setting!r} in recipe {whole!r} is not KEY=VALUE, such as embed=int8:channel")
        if is_cache_key(key):
            cache.append(setting.strip())
            continue
        if key.partition(":")[0] in _OF_INPUTS:
            recipe = _with_inputs(recipe, key, value, whole)
            continue
        is_glob = any(char in key for char in "*?[.") or key == "lm_head" or (value == KEEP and key != "embed")
        if key != "embed" and not is_glob:
            raise RecipeError(
                f"unknown option {key!r} in recipe {whole!r}{nearest(key, ['embed', *_OF_INPUTS, *CACHE_KEYS])} "
                "(known: embed=FORMAT, a=FORMAT for the inputs of linear layers, a:*.down_proj=FORMAT for those of some, "
                "fallback=FORMAT, kv=FORMAT for the KV cache, k=FORMAT and v=FORMAT for its keys and values apart, and layer globs "
                "such as *.down_proj=FORMAT or lm_head=keep)"
            )
        fmt = _layer_format(value)
        recipe = replace(recipe, layers=(*recipe.layers, (key, fmt))) if is_glob else replace(recipe, embed=fmt)
    return replace(recipe, cache=parse_cache(cache)) if cache else recipe


def _with_inputs(recipe: Recipe, key: str, value: str, whole: str) -> Recipe:
    """`a=INPUTS`, `a:GLOB=INPUTS` or `fallback=INPUTS`: see `activation_rules.py`."""
    word, colon, pattern = key.partition(":")
    if colon and (word == "fallback" or not pattern):
        raise RecipeError(f"{key!r} in recipe {whole!r} names no layers; write a:*.down_proj={value}, for example")
    if word == "fallback":
        return replace(recipe, fallback=parse_fallback(value))
    rule = parse_rule(value)
    if colon:
        return replace(recipe, layer_inputs=(*recipe.layer_inputs, (pattern, rule)))
    return replace(recipe, inputs=rule.inputs, range=rule.range)


def _from_toml(path: Path) -> Recipe:
    """recipe = "search@int4:g32", and optionally embed = "...", [layers] with "glob" = "format or keep", [inputs] with
    "glob" = "inputs or float", [cache] with kv = "int8" or k, v and "kv:GLOB", or cache = "int8"."""
    try:
        table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe file {str(path)!r} is not TOML: {error}") from None
    allowed = ("recipe", "embed", *_TABLES, _CACHE)
    for key in table:
        if key not in allowed:
            raise RecipeError(f"recipe file {str(path)!r} has an unknown key {key!r}{nearest(key, allowed)}")
    text = table.get("recipe")
    if not isinstance(text, str) or text.endswith(".toml"):
        raise RecipeError(f'recipe file {str(path)!r} needs a line such as recipe = "search@int4:g32"')
    layers, inputs = (table.get(key, {}) for key in _TABLES)
    for key, found in zip(_TABLES, (layers, inputs)):
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise RecipeError(f'[{key}] in {str(path)!r} is a table of "glob" = "format"')
    recipe = parse_recipe(text)
    if "embed" in table:
        recipe = replace(_with_settings(recipe, [f"embed={table['embed']}"], str(path)), name=None)
    if layers:
        recipe = replace(
            recipe, layers=(*recipe.layers, *((g, _layer_format(v)) for g, v in layers.items())), name=None
        )
    if inputs:
        rules = tuple((g, parse_rule(v)) for g, v in inputs.items())
        recipe = replace(recipe, layer_inputs=(*recipe.layer_inputs, *rules), name=None)
    return recipe if _CACHE not in table else _with_cache(recipe, table[_CACHE], str(path))


def _with_cache(recipe: Recipe, said: Any, path: str) -> Recipe:
    """What a TOML file says of the cache, as text or as a table."""
    if recipe.cache is not None:
        raise RecipeError(f"recipe file {path!r} says twice how the cache is stored, in recipe and in cache; keep one")
    if isinstance(said, str):
        key, equals, _ = said.partition("=")
        return replace(recipe, cache=parse_cache(_split(said if equals and is_cache_key(key) else f"kv={said}", ",")))
    if not isinstance(said, dict) or not said or not all(isinstance(v, str) for v in said.values()):
        raise RecipeError(f'[cache] in {path!r} is a table such as kv = "int8", with k, v and "kv:GLOB" as in recipes')
    for key in said:
        if not is_cache_key(key):
            raise RecipeError(f"[cache] in {path!r} has an unknown key {key!r}{nearest(key, CACHE_KEYS)}")
    return replace(recipe, cache=parse_cache([f"{key}={value}" for key, value in said.items()]))


def to_toml(recipe: Recipe) -> str:
    """The TOML form; reading it gives the recipe back."""
    plain = replace(recipe, embed=EMBED, layers=(), layer_inputs=(), cache=None)
    lines = [f'recipe = "{plain}"', f'embed = "{format_text(recipe.embed)}"']
    if recipe.cache is not None:
        lines.append(f"{_CACHE} = {json.dumps(','.join(cache_settings(recipe.cache)))}")
    if recipe.layers:
        lines += ["", "[layers]", *(f'{json.dumps(pattern)} = "{format_text(fmt)}"' for pattern, fmt in recipe.layers)]
    if recipe.layer_inputs:
        lines += ["", "[inputs]", *(f'{json.dumps(pattern)} = "{rule}"' for pattern, rule in recipe.layer_inputs)]
    return "\n".join(lines) + "\n"


def _parse_call(text: str) -> Call:
    return Call(*call_parts(text))


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
