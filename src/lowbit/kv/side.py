"""CacheSide: how the keys, or the values, of one layer are stored in the KV cache.

    [rotate+][FIT@]FORMAT[:recent=N][:sinks=N][:outliers=N]        or int16, which stores them as good as exactly

The format is an ordinary one, read over the matrix [tokens, width] of one head: `int8` has a scale for each token, `int4:g32` one
for each token and 32 channels, `uint2:32x1:min=fp16` one for each channel and 32 tokens (per channel, as KIVI stores keys), and
`kmeans3:*x1:cb=tensor` one for each channel that was found on calibration text, and learned levels.

    rotate        vectors are multiplied by a Hadamard matrix of the width of a head first, and by its inverse when read;
                  outliers are taken out before
    FIT           what finds the scale: absmax, minmax, search, norm, ...; absmax or minmax when left out
    recent=N      the N newest tokens, the one that asks included, are read exactly
    sinks=N       the first N tokens are read exactly (attention sinks, Xiao et al. 2024)
    outliers=N    N channels of each head, those of the largest magnitude, are stored as float16 beside the others
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.display import Displayed
from lowbit.errors import FormatError, RecipeError, nearest
from lowbit.formats import TENSOR, Format, parse_format
from lowbit.formats.packing import packed_bytes
from lowbit.formats.stores import store_bytes
from lowbit.solvers import Call
from lowbit.solvers.calls import call_parts

ROTATE = "rotate"
EXACT = "int16"
_EXACT_NAMES = (EXACT, "float", "fp16", "bf16", "exact")
_COUNTS = ("recent", "sinks", "outliers")
_MOST = 1 << 20  # tokens or channels that a text may ask for


@dataclass(frozen=True, repr=False)
class CacheSide(Displayed):
    """format: None stores numbers as they are, 16 bits each. Scales are float16 unless the format says otherwise.

    fit: None for the format's own (`fit_used`). FormatError and RecipeError for what a cache cannot store.
    """

    format: Format | None = None
    fit: Call | None = None
    rotate: bool = False
    recent: int = 0
    sinks: int = 0
    outliers: int = 0

    def _brief(self) -> str:
        return repr(str(self))

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if not 0 <= getattr(self, name) <= _MOST:
                raise RecipeError(f"{name}={getattr(self, name)} is not a number from 0 to {_MOST:,}")
        if self.format is None:
            if self.fit is not None or self.rotate or any(getattr(self, name) for name in _COUNTS):
                raise RecipeError(f"{EXACT} stores keys and values as they are and takes no other words")
            return
        if self.format.scale == "fp32":
            object.__setattr__(self, "format", replace(self.format, scale="fp16"))
        self._check_format(self.format)

    def _check_format(self, fmt: Format) -> None:
        for store in (fmt.scale, fmt.offset.store if fmt.offset else None):
            if isinstance(store, Format):
                raise FormatError(f"a cache takes plain scales and offsets, not the nested ones of {fmt}")
        if fmt.offset is None and not (fmt.grid.signed and fmt.grid.hi > 0):
            raise FormatError(
                f"keys and values have both signs and {fmt} has one; use a signed grid, or add ':min=fp16'"
            )
        if fmt.block.rows > 1 and fmt.block.cols != 1:
            raise FormatError(
                f"{fmt} has one scale for several tokens and channels; use {fmt.grid}:g32, or {fmt.grid}:32x1"
            )
        if fmt.codebook is not None and (fmt.scale is None or fmt.codebook != TENSOR):
            raise FormatError(
                f"the learned levels of {fmt} serve all tokens of a layer and need a scale; write ':cb=tensor'"
            )
        if fmt.exponent:
            raise FormatError(f"{fmt}: an exponent is for weights")
        if self.fit is not None and (reason := self.fit.method.declines(fmt)) is not None:
            raise RecipeError(f"{self.fit.name!r} {reason}")

    @property
    def exact(self) -> bool:
        """Whether numbers are stored as they are."""
        return self.format is None

    @property
    def group(self) -> int:
        """Tokens that share a scale for each channel; 1 where each token has its own scales, or all share calibrated ones."""
        return 1 if self.format is None else max(1, self.format.block.rows)

    @property
    def static(self) -> bool:
        """Whether one set of scales, found on calibration text, serves all tokens."""
        return self.format is not None and self.format.block.rows == -1

    @property
    def calibrated(self) -> bool:
        """Whether something of it is found on calibration text: scales for all tokens, or levels."""
        return self.static or (self.format is not None and self.format.codebook is not None)

    @property
    def fit_used(self) -> Call:
        """The fit, or the plain one of the format: minmax where it has an offset, else absmax."""
        if self.fit is not None:
            return self.fit
        return Call("minmax" if self.format is not None and self.format.offset is not None else "absmax")

    def first_recent(self, query: int) -> int:
        """The first position that a query at position `query` reads exactly for being new: `recent` of them, and those of a
        group that share scales with the query's own."""
        first = query + 1 - self.recent
        if self.group > 1:
            first = min(first, query // self.group * self.group)
        return max(0, first)

    def nbytes(self, tokens: int, width: int) -> int:
        """Bytes of `tokens` stored vectors of one head of `width` channels, without those that are kept exactly beside.

        Every vector begins at a byte. Tables from calibration, of which a model has one set however many tokens there are, do
        not count.
        """
        fmt = self.format
        if fmt is None:
            return 2 * tokens * width
        size = packed_bytes(width, fmt.grid.cardinality) + 2 * min(self.outliers, width)
        if self.static:
            return tokens * size
        _, _, per_row = fmt.block.counts((1, width))
        scales = per_row * store_bytes(str(fmt.scale))
        if fmt.offset is not None:
            store = str(fmt.offset.store)
            scales += packed_bytes(per_row, fmt.grid.cardinality) if store == "grid" else per_row * store_bytes(store)
        return tokens * size + -(-tokens // self.group) * scales

    def exact_tokens(self, context: int) -> int:
        """How many of `context` tokens are kept exactly as well: sinks, the newest, and those whose group is not complete."""
        if self.format is None:
            return 0
        newest = max(self.recent, self.group - 1 if self.group > 1 else 0)
        return min(context, self.sinks + newest)

    def __str__(self) -> str:
        if self.format is None:
            return EXACT
        fmt = (
            self.format
            if self.format.scale != "fp16" or -1 not in (self.format.block.rows, self.format.block.cols)
            else replace(self.format, scale="fp32")
        )
        text = str(fmt).removesuffix(":channel").replace(":channel:", ":")
        steps = [ROTATE] * self.rotate + ([str(self.fit)] if self.fit is not None else [])
        counts = [f"{name}={getattr(self, name)}" for name in _COUNTS if getattr(self, name)]
        return ("+".join(steps) + "@" if steps else "") + ":".join([text, *counts])


def parse_side(text: str) -> CacheSide:
    """The side that `text` describes: `parse_side(str(side)) == side`. RecipeError or FormatError otherwise.

    >>> from lowbit.kv.side import parse_side
    >>> parse_side("rotate+search@int4:g32:recent=64").nbytes(1024, 64)  # codes, and 2 scales of float16 for each vector
    36864
    """
    head, at, tail = text.strip().rpartition("@")
    if not at and tail.lower() in _EXACT_NAMES:
        return CacheSide()
    if not at and "+" in tail:
        steps, _, named = tail.rpartition("+")
        raise RecipeError(f"cache {text!r}: write an '@' before the format, as in {steps}@{named}")
    words, counts = [], dict[str, int]()
    for word in tail.split(":"):
        key, equals, value = word.partition("=")
        if key in _COUNTS and equals:
            if key in counts or not (value.isascii() and value.isdigit()) or len(value) > 7:
                raise RecipeError(f"cache {text!r}: {word!r} is not {key}=N, given once")
            counts[key] = int(value)
        else:
            words.append(word)
    rotate, fit = False, None
    for i, step in enumerate(head.split("+") if at else []):
        if step == ROTATE and i == 0:
            rotate = True
        elif fit is None and step:
            fit = Call(*call_parts(step))
        else:
            raise RecipeError(
                f"cache {text!r}: {step!r} does not fit; write rotate+FIT@FORMAT, such as rotate+search@int4:g32"
            )
    if fit is not None and fit.method.kind != "fit":
        raise RecipeError(
            f"cache {text!r}: {fit.name!r} is a {fit.method.kind} for weights; a cache takes fits such as search"
        )
    try:
        fmt = parse_format(":".join(words))
    except FormatError as error:
        raise FormatError(f"cache {text!r}{nearest(words[0], _EXACT_NAMES)}: {error}") from None
    return CacheSide(fmt, fit, rotate, counts.get("recent", 0), counts.get("sinks", 0), counts.get("outliers", 0))
