"""Few layer globs for a format of each tensor, so that an allocation of hundreds of tensors can be read.

A role is a name with its numbers replaced, `model.layers.*.mlp.down_proj`. The most common format of a role is
said once; tensors that differ follow by their numbers, ten blocks at a time: `model.layers.1[0347].mlp.down_proj`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from lowbit.formats import Format
from lowbit.recipes.recipe import Recipe

Entry = tuple[str, Format | None]


def with_layers(
    recipe: Recipe, chosen: Mapping[str, Format | None], kinds: Mapping[str, str], base: Format
) -> Recipe:  # fmt: skip
    """`recipe` with the linear format `base` and globs that give every tensor of `chosen` its format.

    `kinds`: name -> kind (see the inventory) of every tensor that may be quantized; those not in `chosen` keep what
    `recipe` gives them, and the recipe's own globs stay last, so that they win.
    """
    wanted = {name: chosen.get(name, recipe.format_for(name, kind)) for name, kind in kinds.items()}
    # A tensor that a glob of the recipe decides needs no glob of ours.
    free = {n: f for n, f in wanted.items() if not any(recipe.matches(p, n) for p, _ in recipe.layers)}
    plain = replace(recipe, format=base, layers=(), name=None)
    ours: tuple[Entry, ...] = ()
    roles: defaultdict[str, dict[str, Format | None]] = defaultdict(dict)
    for name, fmt in free.items():
        roles[role_of(name)][name] = fmt
    usual = {role: Counter(formats.values()).most_common(1)[0][0] for role, formats in roles.items()}
    ours += _merged(
        (role, fmt) for role, fmt in usual.items() if any(plain.format_for(n, kinds[n]) != fmt for n in roles[role])
    )
    for role, formats in roles.items():
        others: defaultdict[Format | None, list[str]] = defaultdict(list)
        for name, fmt in formats.items():
            if fmt != usual[role]:
                others[fmt].append(name)
        ours += tuple((pattern, fmt) for fmt, names in others.items() for pattern in _numbered(names))
    ours = (*(e for e in ours if "*" in e[0]), *_merged(e for e in ours if "*" not in e[0]))
    # Globs of one role may reach into another where names are unusual: what went wrong is said by name, last.
    made = replace(plain, layers=ours)
    wrong = tuple((n, f) for n, f in free.items() if made.format_for(n, kinds[n]) != f)
    return replace(made, layers=(*ours, *wrong, *recipe.layers))


def globs_of(names: Iterable[str], known: Iterable[str]) -> tuple[str, ...]:
    """Few globs that match all of `names` and nothing else of `known`."""
    wanted, every = dict.fromkeys(names), list(known)
    roles: defaultdict[str, list[str]] = defaultdict(list)
    for name in wanted:
        roles[role_of(name)].append(name)
    found: list[str] = []
    for role, members in roles.items():
        for tried in ((role,), tuple(_numbered(members)), tuple(members)):
            if {n for n in every if any(Recipe.matches(p, n) for p in tried)} == set(members):
                found += tried
                break
    return tuple(found)


def role_of(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `model.layers.*.mlp.up_proj`."""
    return ".".join("*" if part.isdigit() else part for part in name.removesuffix(".weight").split("."))


def block_of(name: str) -> int | None:
    """The first number in a name: the block of the model that it belongs to. None where there is none."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _numbered(names: Iterable[str]) -> Iterator[str]:
    """Globs for names of one role: those that differ in their first number only are gathered by its tens."""
    families: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)
    for name in names:
        parts = name.removesuffix(".weight").split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            yield ".".join(parts)
            continue
        number = parts[at]
        families[".".join([*parts[:at], number[:-1]]), number[:-1], ".".join(parts[at + 1 :])].append(int(number[-1]))
    for (before, tens, after), digits in families.items():
        head = before if tens or before.endswith(".") or not before else before + "."
        yield head + _digits(digits) + (f".{after}" if after else "")


def _digits(digits: list[int]) -> str:
    """[0, 1, 2, 5] -> `[0-25]`; one digit as it is."""
    digits = sorted(set(digits))
    if len(digits) == 1:
        return str(digits[0])
    runs: list[list[int]] = []
    for d in digits:
        if runs and runs[-1][-1] == d - 1:
            runs[-1].append(d)
        else:
            runs.append([d])
    return "[" + "".join(f"{r[0]}-{r[-1]}" if len(r) > 2 else "".join(map(str, r)) for r in runs) + "]"


def _merged(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Entries of one format whose last words differ in one letter become one: `*.[qkv]_proj`."""
    families: defaultdict[tuple[str, str, Format | None], list[str]] = defaultdict(list)
    for pattern, fmt in entries:
        head, dot, leaf = pattern.rpartition(".")
        letter = leaf[:1]
        if len(leaf) > 2 and letter.isalpha() and leaf[1] == "_":
            families[head + dot, leaf[1:], fmt].append(letter)
        else:
            families[pattern, "", fmt] = []
    out: list[Entry] = []
    for (head, tail, fmt), letters in families.items():
        some = "".join(letters) if len(letters) < 2 else f"[{''.join(letters)}]"
        pattern = head + some + tail
        out.append((pattern if "." in pattern else pattern + ".weight", fmt))  # a dot makes it a glob, not an option
    return tuple(out)
