"""Everything that has a name in a recipe: presets, methods, range estimators and named formats, and what is to be said of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError, RecipeError, nearest
from lowbit.formats.parsing import NAMED
from lowbit.kv import CacheFormat
from lowbit.kv.named import about, published
from lowbit.recipes.activation_rules import FALLBACK
from lowbit.recipes.cache_rules import cache_settings
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe  # which also announces transforms and tuners
from lowbit.solvers.ranges.estimator import estimators, options_of
from lowbit.solvers.registry import methods

# Kinds of names, with what a name of the kind is, and how one is written.
KINDS = {
    "preset": ("a recipe with a name", "lowbit quantize MODEL {name}"),
    "fit": ("finds the scale that a block of weights shares", "{name}@FORMAT"),
    "solver": ("chooses the level of each weight", "{name}@FORMAT"),
    "transform": ("rewrites the model before it is rounded, without changing what it computes", "{name}+METHOD@FORMAT"),
    "weighting": ("says how much each token of the text counts", "{name}+METHOD@FORMAT"),
    "tuner": ("trains what is stored, after rounding", "METHOD+{name}@FORMAT"),
    "range": ("finds the fixed range of inputs that are rounded too", "RECIPE,a={name}@int8:tensor"),
    "format": ("how numbers are stored", "METHOD@{name}"),
    "cache": ("a published way to store the KV cache", "RECIPE,kv={name}"),
}
_FUNCTION = re.compile(r"\s\(see `\w+`\)")
_CALLERS = re.compile(
    r"(?<!\S)(?:`\w+` (?:float\d*\s)?\[|`\w+` float|Returns\s|\w+Error\s(?:for|when)\s)(?:(?![.;](?:\s|$)).)*(?P<end>[.;])(?:\s+(?P<next>[a-z](?!\w*\|))?|$)",
    re.DOTALL,
)
_ABOUT_FORMATS = ("grid", "level", "block", "group", "scale", "zero-point", "codebook", "dtype", "type")
METHODS = ("fit", "solver", "transform", "weighting", "tuner")


@dataclass(frozen=True)
class Entry:
    """One name. summary: a plain sentence. facts: (what, text) in reading order. details: formulas, error bounds and sources."""

    name: str
    kind: str
    summary: str
    facts: tuple[tuple[str, str], ...]
    details: str = ""
    group: str = ""


def catalogue() -> list[Entry]:
    """All names, presets first, each kind in its own order."""
    found = [_preset(name) for name in PRESETS]
    every = methods()
    for kind in METHODS:
        found += [_method(name) for name, method in every.items() if method.kind == kind]
    for name, estimator in estimators().items():
        summary, _, rest = (inspect.getdoc(estimator) or "").partition("\n")
        facts = [("options", pairs(options_of(estimator))), ("written as", KINDS["range"][1].format(name=name))]
        found.append(Entry(name, "range", summary, _given(facts), rest.strip()))
    for name, text in NAMED.items():
        facts = [("stands for", text), ("written as", KINDS["format"][1].format(name=name))]
        found.append(Entry(name, "format", f"The usual name of {text}.", tuple(facts)))
    return [*found, *map(_cache, published())]


def matching(entries: Sequence[Entry], what: str) -> tuple[list[Entry], list[str]]:
    """The entries of a name, of a kind, of a group of presets, or with `what` in their name; and names that only contain it.

    RecipeError where there are none, with the names that are nearest.
    """
    word = what.strip().lower()
    kind = word.removesuffix("s")
    if kind == "method":
        return [e for e in entries if e.kind in METHODS], []
    if kind in KINDS:
        return [e for e in entries if e.kind == kind], []
    bare = word.rstrip("12345678")  # kivi2 is kivi with 2 bits
    exact = [e for e in entries if e.name == word or (e.kind == "cache" and e.name == bare)]
    partly = [e for e in entries if word and word in e.name and e not in exact]
    if exact:
        return exact, list(dict.fromkeys(e.name for e in partly if e.name != word))
    found = partly or [e for e in entries if word and word in e.group]
    if not found:
        raise RecipeError(_unknown(what, entries))
    return found, []


def _unknown(what: str, entries: Sequence[Entry]) -> str:
    if what.strip().lower().removesuffix("s") in _ABOUT_FORMATS:
        return (
            f"{what!r} is no name; the levels, blocks and scales of stored numbers are what a format says, such as int4:g32 "
            "(`lowbit recipes format` lists those with a name of their own)"
        )
    try:
        Recipe.parse(what)
    except (LowbitError, ValueError):
        known = [*dict.fromkeys(e.name for e in entries), *KINDS]
        return (
            f"no preset, method or format is called {what!r}{nearest(what, known)} (`lowbit recipes` lists the names)"
        )
    return f"{what!r} is a recipe as it stands and not a name; `lowbit plan MODEL {what}` says what it would do"


def to_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """The entries as JSON values, by kind."""
    by_kind = {kind: {e.name: e for e in entries if e.kind == kind} for kind in KINDS}
    every = methods()
    return {
        "presets": {name: _preset_json(name) for name in by_kind["preset"]},
        "methods": {
            e.name: {"kind": e.kind, "summary": e.summary, "options": every[e.name].options, "details": e.details}
            for kind in METHODS
            for e in by_kind[kind].values()
        },
        "formats": {name: NAMED[name] for name in by_kind["format"]},
        "caches": {name: cache_text(name) for name in by_kind["cache"]},
        "ranges": {name: options_of(estimators()[name]) for name in by_kind["range"]},
        "fallback": fallback(),
    }


def fallback() -> str:
    """What static inputs become where their range explodes, as a recipe says it."""
    return f"{FALLBACK}:over={FALLBACK.over:g}"


def pairs(options: Mapping[str, Any]) -> str:
    """'damp=0.01, order=1'."""
    return ", ".join(f"{name}={default}" for name, default in options.items())


def _preset_json(name: str) -> dict[str, str]:
    preset = PRESETS[name]
    return {
        "recipe": preset.text, "with_calibration": str(Recipe.parse(name).calibrated()), "group": preset.group,
        "about": preset.about, "when": preset.when, "source": preset.source,
    }  # fmt: skip


def _preset(name: str) -> Entry:
    preset = PRESETS[name]
    facts = [
        ("when", preset.when), ("stands for", preset.text), ("with text", preset.calibrated or ""), ("from", preset.source),
        ("written as", KINDS["preset"][1].format(name=name)),
    ]  # fmt: skip
    return Entry(name, "preset", f"{preset.about}.", _given(facts), group=preset.group)


def _method(name: str) -> Entry:
    method = methods()[name]
    users = [preset for preset, p in PRESETS.items() if name in _steps(p.text) | _steps(p.calibrated or "")]
    facts = [
        ("options", pairs(method.options)), ("presets", ", ".join(users)),
        ("written as", KINDS[method.kind][1].format(name=name)),
    ]  # fmt: skip
    return Entry(name, method.kind, method.summary, _given(facts), for_readers(method.details))


def for_readers(details: str) -> str:
    """Details of a docstring without what only callers of the function need: shapes of arguments, errors, names of functions."""
    return _CALLERS.sub(_rest, _FUNCTION.sub("", details)).rstrip()


def _rest(found: re.Match[str]) -> str:
    """What stands behind a semicolon becomes a sentence."""
    following = found["next"] or ""
    return following.upper() if found["end"] == ";" and re.fullmatch(r"[a-z]", following) else following


def cache_text(name: str) -> str:
    """The settings that a published cache stands for, with its usual bits."""
    return ",".join(cache_settings(CacheFormat.of(name)))


def _cache(name: str) -> Entry:
    method = published()[name]
    summary, _, details = about(name).partition("\n")
    facts = [
        ("stands for", cache_text(name)), ("bits", f"{method.bits[0]} to {method.bits[-1]}, {method.usual} unless given"),
        ("written as", KINDS["cache"][1].format(name=f"{name}{method.usual}")),
    ]  # fmt: skip
    return Entry(name, "cache", summary, tuple(facts), details.strip("\n").rstrip())


def _steps(text: str) -> set[str]:
    """The methods of a preset's recipe."""
    return set(text.partition("@")[0].split("+"))


def _given(facts: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    return tuple((what, text) for what, text in facts if text)
