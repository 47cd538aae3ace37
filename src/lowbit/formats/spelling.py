"""What a text that is no format most likely means: `int4:32`, `int4-g32`, `g32:int4`, `4bit-128g`, `int8:per-channel`.

Nothing here decides what is accepted (that is `parsing.py`); it finds the right spelling that an error then shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# A group that a number of bits usually has, where a text names none; all others are one scale a row.
USUAL_BLOCK = {**dict.fromkeys(("int2", "uint2"), "g16"), **{f"{sign}int{bits}": "g32" for sign in ("", "u") for bits in (3, 4, 5, 6, 7)},
               "int8": "g128", "uint8": "g128", "nf4": "g64", "e2m1": "g32", "fp4": "g32", "bnb_fp4": "g64", "iq4nl": "g32"}  # fmt: skip
_BETWEEN = re.compile(r"[\s:;,/@+._=-]*")
_FLOATS = {"float8": "fp8", "fp8": "fp8", "f8": "fp8", "e4m3fn": "e4m3", "float4": "fp4", "fp4": "fp4", "f4": "fp4"}
_LOOSE = re.compile(
    r"(?P<float>(?:float8|fp8|f8)[-_ ]?(?P<kind>e4m3|e5m2)(?:fn)?|e4m3fn|float8|float4|fp8|fp4|f8|f4|normal[-_ ]?float4?)(?![a-z0-9])"
    r"|(?P<integer>(?P<sign>u?)i(?:nt)?[-_ ]?(?P<bits>[1-8]))(?![0-9])"
    r"|(?P<width>w?(?P<of>[1-8])(?:a16|[-_ ]?bits?)|w(?P<weights>[1-8]))(?![0-9a])"
    r"|(?P<block>(?:block[-_ ]?size|group[-_ ]?size|group|block|gs|g)[-_ =:]?(?P<size>[0-9]{1,5})|(?P<before>[0-9]{2,5})g)(?![a-z0-9])"
    r"|(?P<row>(?:per[-_ ]?)?(?:channel|row)(?:[-_ ]?wise)?)(?![a-z])"
    r"|(?P<tensor>(?:per[-_ ]?)?tensor(?:[-_ ]?wise)?)(?![a-z])"
    r"|(?P<asym>asym(?:metric)?|zero[-_ ]?points?|zp|affine)(?![a-z])"
    r"|(?P<sym>sym(?:metric)?)(?![a-z])"
    r"|(?P<number>[0-9]{1,5})(?![a-z0-9])"
)


@dataclass
class Loose:
    """What was read of a text: the grid, the block and the offset, each empty where the text does not say it."""

    grid: str = ""
    block: str = ""
    offset: str = ""

    def text(self, block: str = "") -> str:
        """As a format is written; `block` where the text names none."""
        return ":".join(filter(None, (self.grid, self.block or block or USUAL_BLOCK.get(self.grid, ""), self.offset)))


def loosely(text: str, names: Iterable[str] = ()) -> Loose | None:
    """The parts of a text in any order and with any signs between them, None where a part is none that is known.

    names: grids and formats that are taken as they are.
    """
    text, found, at = text.lower().strip(), Loose(), 0
    known = sorted(names, key=len, reverse=True)
    while at < len(text):
        name = next(
            (n for n in known if text.startswith(n, at) and not text[at + len(n) : at + len(n) + 1].isalnum()), None
        )
        match = None if name else _LOOSE.match(text, at)
        if name is None and match is None:
            return None
        part, value = ("grid", name) if match is None else _part(match, found)
        if not value and part != "sym":
            return None
        if part != "sym":
            if getattr(found, part):
                return None  # two of a kind: which is meant is not known
            setattr(found, part, value)
        between = _BETWEEN.match(text, at + len(name) if match is None else match.end())  # type: ignore[arg-type]
        at = len(text) if between is None else between.end()
    return found if found.grid else None


def _part(match: re.Match[str], found: Loose) -> tuple[str, str]:
    """(field of `Loose`, its value)."""
    if match["float"]:
        return "grid", match["kind"] or ("nf4" if match["float"].startswith("normal") else _FLOATS[match["float"]])
    if match["integer"]:
        return "grid", f"{match['sign']}int{match['bits']}"
    if match["width"]:
        return "grid", f"int{match['of'] or match['weights']}"
    if match["block"]:
        return "block", f"g{int(match['size'] or match['before'])}"
    if match["row"] or match["tensor"]:
        return "block", "channel" if match["row"] else "tensor"
    if match["number"]:  # `int4:32`: a number after the grid can only be the group
        size = int(match["number"])
        return "block", f"g{size}" if found.grid and size > 1 else ""
    return ("offset", "asym") if match["asym"] else ("sym", "")
