"""The text form of a format, which round-trips: `parse_format(str(f)) == f`.

    GRID[:BLOCK][:OPTION...]

    GRID     int1..int8, uint1..uint8, ternary, binary, e4m3 (fp8), e5m2, e2m1 (fp4), nf4, bnb_fp4, iq4nl,
             normal1..normal7 (levels of least error for normal numbers, Max 1960),
             kmeans1..kmeans8, or a named format: mxfp4, nvfp4, mxfp8, nf4-dq, and ggml's block types (q4_0, q4_1, q5_0,
             q5_1, q8_0, iq4_nl, iq4_xs, q2_k, q3_k, q4_k, q5_k, q6_k)
    BLOCK    tensor, channel, token, g64 (64 weights of a row), 128x128, *x128 (128 columns of all rows);
             channel when left out
    OPTION   sym            no offset (the default)
             asym           rounded zero-point in the bits of the grid
             narrow         symmetric range: int8 without -128
             s=STORE        how the scale is kept: fp32 fp16 bf16 e8m0 e4m3, or (FORMAT) when nested
             zero=int32     rounded zero-point, any integer
             zero=fp32      unrounded zero-point (fp32, fp16, bf16)
             min=fp16       float minimum instead of a zero-point (fp32, fp16, bf16, or (FORMAT))
             cb=BLOCK       learned grids: scale per block, codebook per BLOCK
             l=STORE        learned grids: how levels are kept (fp16)
             x=-12          what is stored is that of the weight / 2^-12; a weight too small or too large for its
                            scales gets one by itself

A scale is kept in fp16 for groups and in fp32 for anything larger, unless `s=` says otherwise.
"""

from __future__ import annotations

from lowbit.errors import FormatError, nearest
from lowbit.formats import stores
from lowbit.formats.blocks import CHANNEL, TENSOR, Block
from lowbit.formats.format import Format, Offset, Store
from lowbit.formats.grids import CodebookGrid
from lowbit.formats.named_grids import grid_names, parse_grid
from lowbit.formats.spelling import loosely

# Formats with a name of their own; each is plain text in the grammar above.
NAMED = {
    "mxfp4": "e2m1:g32:s=e8m0",
    "mxfp8": "e4m3:g32:s=e8m0",
    "nvfp4": "e2m1:g16:s=(e4m3:tensor)",
    "nf4-dq": "nf4:g64:s=(uint8:g256:s=fp32)",
    "q4_0": "int4:g32",
    "q4_1": "uint4:g32:min=fp16",
    "q5_0": "int5:g32",
    "q5_1": "uint5:g32:min=fp16",
    "q8_0": "int8:g32",
    "iq4_nl": "iq4nl:g32",
    "iq4_xs": "iq4nl:g32:s=(int6:g8)",
    "q2_k": "uint2:g16:s=(uint4:g16):min=(uint4:g16)",
    "q3_k": "int3:g16:s=(int6:g16)",
    "q4_k": "uint4:g32:s=(uint6:g8):min=(uint6:g8)",
    "q5_k": "uint5:g32:s=(uint6:g8):min=(uint6:g8)",
    "q6_k": "int6:g16:s=(int8:g16)",
}

_OPTIONS = ("sym", "asym", "narrow", "s=", "zero=", "min=", "cb=", "l=", "x=")


# How deep formats may be nested. The deepest in use is one.
_DEEPEST = 4
_LONGEST = 80  # characters of a text whose meaning is guessed at


class _Failure(Exception):
    def __init__(self, at: int, why: str) -> None:
        self.at, self.why = at, why


def parse_format(text: str) -> Format:
    """The format that `text` describes, in capitals or not; FormatError showing the position otherwise.

    >>> lowbit.parse_format("int4:g32").nbytes((4096, 4096))  # bytes of codes and scales
    9437184
    """
    try:
        return _parse(text.lower() if text.isascii() else text, 0)
    except _Failure as failure:
        why, meant = failure.why, meant_format(text)
        if meant is not None:
            why = f"{why.partition('; did you mean')[0]}; did you mean {meant!r}?"
        message = f"format {text!r} does not parse at position {failure.at + 1}: {why}"
        raise FormatError(f"{message}\n  {text}\n  {' ' * failure.at}^") from None
    except FormatError as error:
        raise FormatError(f"format {text!r}: {error}") from None


def meant_format(text: str) -> str | None:
    """The right spelling of a text that does not parse and most likely means a format, None where none is likely."""
    found = loosely(text, [*grid_names(), *NAMED]) if len(text) <= _LONGEST else None
    if found is None:
        return None
    meant = found.text()
    try:
        _parse(meant, 0)
    except (_Failure, FormatError):
        return None
    return meant


def _split(text: str, start: int, separator: str = ":") -> list[tuple[int, str]]:
    """(position, word) of the words between separators that are not inside parentheses."""
    words, depth, begin = [], 0, 0
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth > _DEEPEST:
            raise _Failure(start + i, f"formats are nested more than {_DEEPEST} deep")
        if depth < 0:
            raise _Failure(start + i, "a ')' without its '('")
        if char == separator and depth == 0:
            words.append((start + begin, text[begin:i]))
            begin = i + 1
    if depth:
        raise _Failure(start + text.rfind("("), "a '(' that is never closed")
    words.append((start + begin, text[begin:]))
    return words


def _parse(text: str, start: int) -> Format:
    words = _split(text, start)
    at, name = words[0]
    if name in NAMED:
        words = [(at, word) for _, word in _split(NAMED[name], 0)] + words[1:]
        name = words[0][1]
    known = [*grid_names(), "fp8", "fp4", *NAMED]
    if name not in known:
        raise _Failure(at, f"unknown grid {name!r}, the levels of a format{nearest(name, known)}")

    block: Block | None = None
    settings: dict[str, tuple[int, str]] = {}
    for position, word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals and (found := _block(word)) is not None:
            if block is not None and position != at:
                raise _Failure(position, f"a second block {word!r}; a format has one")
            block = found
            continue
        if key + equals not in _OPTIONS:
            raise _Failure(position, f"unknown option {word!r}{nearest(key + equals, _OPTIONS)}")
        if key in settings and position != at and settings[key][0] != at:
            raise _Failure(position, f"option {key!r} is given twice")
        settings[key] = (position, value)
    return _build(name, block or CHANNEL, settings)


def _build(name: str, block: Block, settings: dict[str, tuple[int, str]]) -> Format:
    grid = parse_grid(name, narrow="narrow" in settings)
    given = [k for k in ("sym", "asym", "zero", "min") if k in settings]
    if len(given) > 1:
        raise _Failure(settings[given[1]][0], f"{given[0]!r} and {given[1]!r} exclude each other")
    offset = None
    if "asym" in settings:
        offset = Offset("zero", "grid")
    elif "zero" in settings:
        kept = _store("zero", settings, ("int32", *stores.FLOAT_STORES))
        offset = Offset("zero" if kept == "int32" else "float", kept)
    elif "min" in settings:
        offset = Offset("min", _store("min", settings, stores.FLOAT_STORES))

    scale: Store | None = _default_scale(block)
    codebook, levels = None, "fp16"
    if isinstance(grid, CodebookGrid):
        codebook = block
        if "cb" in settings:
            position, value = settings["cb"]
            codebook = _block(value)
            if codebook is None:
                raise _Failure(position, f"'cb={value}' names no block (tensor, channel, g64, 128x128)")
        elif "s" in settings:
            raise _Failure(settings["s"][0], "a codebook without 'cb=' holds real values and has no scale")
        else:
            scale = None
        if "l" in settings:
            levels = str(_store("l", settings, stores.FLOAT_STORES))
    else:
        for key in ("cb", "l"):
            if key in settings:
                raise _Failure(settings[key][0], f"{key!r} is for learned codebooks (kmeans), not for {name!r}")
    if "s" in settings:
        scale = _store("s", settings, stores.SCALE_STORES)
    return Format(grid, block, scale, offset, codebook, levels, _exponent(settings))


def _exponent(settings: dict[str, tuple[int, str]]) -> int:
    position, value = settings.get("x", (0, "0"))
    if not _is_number(value.removeprefix("-")) or len(value) > 4:
        raise _Failure(position, f"'x={value}' is no power of two; it is a whole number such as -12")
    return int(value)


def _store(key: str, settings: dict[str, tuple[int, str]], allowed: tuple[str, ...]) -> Store:
    position, value = settings[key]
    if value.startswith("(") and value.endswith(")"):
        return _parse(value[1:-1], position + len(key) + 2)
    if value not in allowed:
        raise _Failure(position, f"{value!r} is not one of {', '.join(allowed)}{nearest(value, allowed)}")
    return value


def _block(word: str) -> Block | None:
    if word == "tensor":
        return TENSOR
    if word in ("channel", "token"):
        return CHANNEL
    if word[:1] == "g" and _is_number(word[1:]):
        return Block(1, int(word[1:]))
    rows, cross, cols = word.partition("x")
    if cross and all(size == "*" or _is_number(size) for size in (rows, cols)):
        return Block(*(-1 if size == "*" else int(size) for size in (rows, cols)))
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _default_scale(block: Block) -> str:
    return "fp32" if -1 in (block.rows, block.cols) else "fp16"


def format_text(f: Format) -> str:
    """The canonical text of a format, defaults left out."""
    words = [f.grid.name, str(f.block)]
    if getattr(f.grid, "narrow", False):
        words.append("narrow")
    if f.offset is not None:
        if f.offset.store == "grid":
            words.append("asym")
        else:
            words.append(f"{'min' if f.offset.kind == 'min' else 'zero'}={_store_text(f.offset.store)}")
    if f.codebook is not None and f.scale is not None:
        words.append(f"cb={f.codebook}")
    if f.scale is not None and f.scale != _default_scale(f.block):
        words.append(f"s={_store_text(f.scale)}")
    if f.levels_store != "fp16":
        words.append(f"l={f.levels_store}")
    if f.exponent:
        words.append(f"x={f.exponent}")
    text = ":".join(words)
    return next((name for name, full in NAMED.items() if _names_itself(name) and full == text), text)


def _names_itself(name: str) -> bool:
    """Formats known by their standard's name print as that; the others print their parts."""
    return name.startswith(("mx", "nv"))


def _store_text(store: Store) -> str:
    return f"({store})" if isinstance(store, Format) else store
