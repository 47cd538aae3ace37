"""Names of recipes as people write them: what is taken as another spelling of a preset, and what an error then suggests.

`accepted` gives the lowbit word where a name has one meaning (`W4`, `4bit`, `w4a16`, `LLM.int8`). `instead` is a sentence for
what does not parse: the right spelling (`awq-int4` is `awq`), or where it belongs (`q4_k_m` to `--as gguf`).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from lowbit.errors import LowbitError, RecipeError, nearest
from lowbit.formats import parse_format
from lowbit.formats.named_grids import grid_names
from lowbit.formats.parsing import NAMED, meant_format
from lowbit.formats.spelling import loosely
from lowbit.recipes.presets import PRESETS
from lowbit.solvers.registry import methods

# `4`, `4bit`, `4-bit`, `w4a16`: so many bits of the weights, and nothing else said.
_BITS = re.compile(r"w?([1-8])(?:a16|[-_ ]?bits?)?")
_FLOAT = re.compile(r"bf16|f(?:p|loat)?(?:16|32)|bfloat16|16[-_ ]?bits?|w16a16|half|none")
_GGML = re.compile(r"(?:ud-)?i?q([1-8])(?:$|[-_ k].*)")
_BITSANDBYTES = re.compile(r"(?:bnb|bitsandbytes)(?:[-_ :]?(?:(?P<eight>.*8.*)|.*))?")
_TERNARY = re.compile(r"b?1[._]58(?:[-_ ]?bits?)?|bitnet")
_INT8_INPUTS = re.compile(r"(?<![a-z0-9])(w[1-8])a8(?![0-9])")
_SIGNS = " :;,@+-_./="
_LONGEST = 80  # characters of a text whose meaning is guessed at


def accepted(name: str) -> str:
    """A recipe without its settings, in lowbit's own spelling where it has one meaning; otherwise as it is, in small letters."""
    word = name.strip().lower() if name.isascii() else name
    if word in PRESETS:
        return word
    bits = _BITS.fullmatch(word)
    if bits is not None and f"w{bits[1]}" in PRESETS:
        return f"w{bits[1]}"
    if word in NAMED or word in grid_names():
        return word
    return {_squashed(preset): preset for preset in PRESETS}.get(_squashed(word), word)


def of_bits(bits: int | None, group_size: int | None = None) -> str:
    """The recipe that `--bits 4` and `--group-size 64` stand for: a preset of so many bits, or integers in groups.

    group_size: weights of a row that share a scale, -1 for a whole row; None leaves it to the preset. RecipeError for what
    no format has.
    """
    if bits is None:
        raise RecipeError(f"--group-size {group_size} goes with --bits; add --bits 4, or write int4:g{group_size}")
    if not 2 <= bits <= 8:
        raise RecipeError(f"--bits is a number from 2 to 8, not {bits}; `lowbit recipes` lists what else there is")
    if group_size is None:
        return f"w{bits}" if f"w{bits}" in PRESETS else f"int{bits}:g32"
    if group_size != -1 and group_size < 1:
        raise RecipeError(f"--group-size is a number of weights such as 64, or -1 for a whole row, not {group_size}")
    return f"int{bits}:channel" if group_size == -1 else f"int{bits}:g{group_size}"


def instead(name: str, parse: Callable[[str], object]) -> str | None:
    """What to write for a recipe without its settings that does not parse, as a sentence; None where nothing is known.

    parse: of a recipe, an error for what is none.
    """
    word = name.strip().lower()
    if len(word) > _LONGEST or not word:
        return None
    for explain in (_elsewhere, _known, _llama_cpp):
        if (said := explain(word)) is not None:
            return said
    meant = _composition(word)
    if meant is None or meant == word:
        return None
    try:
        parse(meant)
    except LowbitError:
        return None
    stands = f" ({PRESETS[meant].text})" if meant in PRESETS else ""
    return f"unknown recipe {name!r}; did you mean {meant!r}{stands}?"


def _squashed(word: str) -> str:
    return re.sub(r"[-_. ()]", "", word)


def _elsewhere(word: str) -> str | None:
    """A mix or a program, which belong to `--as`."""
    from lowbit.interchange.exporters.exporter import exporters

    for kind in exporters().values():
        if word in kind.mixes():
            return (
                f"{word!r} is a mix of several formats, for {kind.name} files: write `lowbit quantize MODEL {word} --as {kind.name}`"
                f"{_of_that_size(word)}"
            )
        if word == kind.name:
            return f"{word!r} is no recipe but a format of files: write `lowbit quantize MODEL w4 --as {word}`"
    return None


def _known(word: str) -> str | None:
    """Names of other programs for what lowbit calls otherwise, or does not do."""
    if _FLOAT.fullmatch(word):
        return f"{word!r} is no recipe: lowbit makes 8 bits and fewer; w8 is hard to tell from the original"
    bits = _BITS.fullmatch(word)
    if bits is not None and f"w{bits[1]}" not in PRESETS:
        return f"unknown recipe {word!r}{nearest(word, PRESETS)} ({bits[1]} bits are written int{bits[1]}:g32)"
    if _TERNARY.fullmatch(word):
        return f"unknown recipe {word!r}; did you mean 'ternary:g64'? only a model that was trained for it works in so few bits"
    found = _BITSANDBYTES.fullmatch(word)
    if found is not None and "fp4" not in word:
        meant = "llm-int8" if found["eight"] else "nf4"
        return f"unknown recipe {word!r}; did you mean {meant!r} ({PRESETS[meant].text})?"
    return None


def _llama_cpp(word: str) -> str | None:
    """A name of llama.cpp's that is misspelt, or stands for several."""
    from lowbit.interchange.exporters.exporter import exporters

    found = _GGML.fullmatch(word)
    if found is None or word in NAMED:
        return None
    mixes = dict.fromkeys(mix for kind in exporters().values() for mix in kind.mixes())
    spelled = next((mix for mix in mixes if _squashed(mix) == _squashed(word)), None)
    hint = f"; did you mean {spelled!r}?" if spelled else "" if word[-1] == found[1] else nearest(word, mixes)
    known = ", ".join([mix for mix in mixes if f"q{found[1]}" in mix] or mixes)
    return f"unknown recipe {word!r}{hint} (names of llama.cpp's that go with --as gguf: {known}){_of_that_size(word)}"


def _of_that_size(word: str) -> str:
    """The recipe of lowbit's own that is nearest in size to a name of llama.cpp's."""
    bits = next(char for char in word if char.isdigit())
    return f"; without --as, {f'w{bits}' if f'w{bits}' in PRESETS else f'int{bits}:g32'} has about as many bits"


def _composition(word: str) -> str | None:
    """Methods and a format in any order, with any signs between them: `gptq-4bit-128g`, `int4@gptq`, `awq:w4`."""
    inputs = _INT8_INPUTS.search(word)
    rest = _INT8_INPUTS.sub(r"\1", word)
    # What a format is made of is not looked for among the methods: `nf4` and `w4` are presets too, `per-channel` a block.
    names = [n for n in {**methods(), **PRESETS} if not meant_format(n) and not meant_format(f"int8:{n}")]
    found = re.compile(
        rf"(?<![a-z0-9])(?:{'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?![a-z0-9])"
    )
    steps = found.findall(rest)
    rest = found.sub(":", rest).strip(_SIGNS)
    fmt = meant_format(rest)
    if fmt is None:
        return None
    settings = ",a=int8:token" if inputs is not None else ""
    if len(steps) == 1 and steps[0] in PRESETS and not settings and not _says_block(rest):
        own = PRESETS[steps[0]].text.partition("@")[2].partition(",")[0]
        if parse_format(own).grid.bits == parse_format(fmt).grid.bits:
            return steps[0]
    return ("+".join(steps) + "@" if steps else "") + fmt + settings


def _says_block(text: str) -> bool:
    """Whether a loosely written format says which weights share a scale."""
    found = loosely(text, [*grid_names(), *NAMED])
    return found is not None and (bool(found.block) or found.grid in NAMED)
