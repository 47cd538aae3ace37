"""Inputs: how the inputs of a linear layer are stored in few bits before the product (W8A8, W4A8).

    x ~= scale * (level - offset)             for x [tokens, channels], blocks over the two

The format is an ordinary one: `int8:token` has a scale for each token, `int8:g128` one for each token and 128
channels, `int8:tensor` a single one. A *dynamic* scale is computed from the tensor at hand, its largest magnitude or
its range; a *static* one was found on calibration text and is stored beside the weight. The text form round-trips:

    FORMAT[:static][:outliers=T][:divisor]

    static        the scale is stored; its block spans all tokens, as tensor does
    outliers=6    columns with any |x| >= 6 in this batch stay float (LLM.int8, Dettmers et al. 2022, section 3)
    divisor       x / d before anything else, d stored per channel: SmoothQuant where no layer before can absorb it
    float         in place of FORMAT: no rounding, so that only the divisor is left
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.errors import FormatError, nearest
from lowbit.formats import stores
from lowbit.formats.blocks import CHANNEL, map_blocks, reduce_blocks
from lowbit.formats.format import Format
from lowbit.formats.grids import IntGrid
from lowbit.formats.nearest import inverse
from lowbit.formats.parsing import parse_format

FLOAT = "float"
_WORDS = ("static", "divisor", "outliers=")


@dataclass(frozen=True)
class Inputs:
    """What becomes of the inputs of a layer. `format` None: they stay float and are only divided.

    Scales of inputs are float32 (or e8m0 and e4m3 where the format says so), whatever the width of the block.
    FormatError for what cannot be done while the model runs: learned levels, nested scales, a static scale per token.
    """

    format: Format | None
    static: bool = False
    divisor: bool = False
    outliers: float | None = None

    def __post_init__(self) -> None:
        if self.format is None:
            if self.static or self.outliers is not None or not self.divisor:
                raise FormatError("float inputs have nothing to round, so they take 'divisor' and nothing else")
            return
        if isinstance(self.format.scale, str) and self.format.scale in stores.FLOAT_STORES:
            object.__setattr__(self, "format", replace(self.format, scale="fp32"))
        fmt, shown = self.format, _format_text(self.format)
        if fmt.codebook is not None:
            raise FormatError(f"the levels of {shown} are learned, which takes too long for inputs; use an int8 or fp8")
        if not isinstance(fmt.scale, str) or (fmt.offset is not None and not isinstance(fmt.offset.store, str)):
            raise FormatError(f"inputs take plain scales and offsets, not the nested ones of {shown}")
        if fmt.offset is None and not (fmt.grid.signed and fmt.grid.hi > 0):
            raise FormatError(f"inputs have both signs and {shown} has one; use a signed grid, or add ':asym'")
        if self.static and fmt.block.rows != -1:
            raise FormatError(
                f"a static scale serves all tokens, and {shown} has one for each; use {fmt.grid}:tensor:static"
            )
        if self.outliers is not None and not 0 < self.outliers < float("inf"):
            raise FormatError(f"outliers={self.outliers} is no magnitude; LLM.int8 takes outliers=6")

    def __str__(self) -> str:
        words = [FLOAT if self.format is None else _format_text(self.format)]
        words += ["static"] * self.static
        words += [] if self.outliers is None else [f"outliers={_number(self.outliers)}"]
        return ":".join(words + ["divisor"] * self.divisor)

    def parts(self, width: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> (dtype, shape) of what is stored beside a weight with `width` inputs; empty when plain dynamic."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        if self.static and self.format is not None:
            blocks = self.format.block.counts((1, width))[1:]
            found["input_scale"] = torch.float32, blocks
            if self.format.offset is not None:
                found["input_offset"] = torch.float32, blocks
        if self.divisor:
            found["input_divisor"] = torch.float32, (width,)
        return found


def _number(value: float) -> str:
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def _format_text(fmt: Format) -> str:
    """The text of a format as inputs call it: a row is a token, and a float32 scale goes without saying."""
    plain = replace(fmt, scale="fp16") if fmt.scale == "fp32" and -1 not in (fmt.block.rows, fmt.block.cols) else fmt
    return ":".join("token" if word == str(CHANNEL) else word for word in str(plain).split(":"))


def parse_inputs(text: str) -> Inputs:
    """The inputs that `text` describes: `parse_inputs(str(i)) == i`. FormatError otherwise."""
    kept, static, divisor, outliers = [], False, False, None
    for word in text.split(":"):
        key, equals, value = word.partition("=")
        if key + equals not in _WORDS:
            kept.append(word)
        elif (static, divisor, outliers is not None)[_WORDS.index(key + equals)]:
            raise FormatError(f"inputs {text!r} say {key!r} twice")
        elif equals:
            outliers = _magnitude(text, value)
        else:
            static, divisor = static or key == "static", divisor or key == "divisor"
    if kept == [FLOAT]:
        return Inputs(None, static, divisor, outliers)
    try:
        return Inputs(parse_format(":".join(kept)), static, divisor, outliers)
    except FormatError as error:
        raise FormatError(f"inputs {text!r}{nearest(kept[-1], _WORDS)}: {error}") from None


def _magnitude(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise FormatError(f"inputs {text!r}: outliers={value} is no number; LLM.int8 takes outliers=6") from None


@dataclass(frozen=True, eq=False)
class InputQuantizer:
    """Inputs together with what is stored for them: float32, of the shapes that `Inputs.parts` gives."""

    inputs: Inputs
    scale: Tensor | None = None
    offset: Tensor | None = None
    divisor: Tensor | None = None

    @staticmethod
    def of(inputs: Inputs, width: int, parts: Mapping[str, Tensor]) -> InputQuantizer:
        """Of a layer with `width` inputs. FormatError when a part is missing, extra, or of a wrong type or shape."""
        expected, found = inputs.parts(width), {k: (t.dtype, tuple(t.shape)) for k, t in parts.items()}
        if expected != found:
            raise FormatError(f"{inputs} inputs of width {width} are stored as {expected}, not as {found}")
        return InputQuantizer(inputs, *(parts.get(f"input_{part}") for part in ("scale", "offset", "divisor")))

    def divide(self, x: Tensor) -> Tensor:
        """x [..., channels] / divisor, float32."""
        x = x.to(torch.float32)
        return x if self.divisor is None else x / self.divisor

    def round(self, x: Tensor) -> Tensor:
        """What a float product is to be taken of instead of `x`, in the type of `x`."""
        return round_inputs(self.divide(x), self.inputs, self.scale, self.offset).to(x.dtype)


def range_to_scale(low: Tensor, high: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scale and offset, float32 of the shape of `low`, that put the range [low, high] on the levels of `fmt`.

    Symmetric: s = max(|low|, |high|) / reach, None. With an offset: s = (high - low) / (hi - lo), z = lo - low / s in
    level units, the range widened to include zero where the zero-point is kept on the grid, rounded where it is an
    integer. Scales are as their store would give them back. Source: Jacob et al. 2018, section 2.1.
    """
    store = str(fmt.scale)
    if fmt.offset is None:
        return _stored(torch.maximum(low.abs(), high.abs()) / fmt.grid.reach, store), None
    if fmt.offset.store == "grid":
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / (fmt.grid.hi - fmt.grid.lo)
    # A range of one value c: the scale |c| and c itself a whole number of levels from the offset.
    scale = _stored(torch.where(scale > 0, scale, torch.where(low == 0, 1.0, low.abs())), store)
    offset = fmt.grid.lo - low / scale
    return scale, offset.round() if fmt.offset.kind == "zero" else offset


def _stored(scale: Tensor, store: str) -> Tensor:
    return scale if store == "fp32" else stores.rounded(scale, store)


def outlier_columns(x: Tensor, threshold: float) -> Tensor:
    """bool [channels]: where any |x| [..., channels] of this batch reaches the threshold."""
    return (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)


def quantize_inputs(
    x: Tensor, inputs: Inputs, scale: Tensor | None = None, offset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels, scale and offset of x [..., channels]; x is divided already, and outlier columns are taken as zero.

    Levels have the shape of `x`: int8 on signed integer grids, uint8 on unsigned ones, else float32. Scale and offset
    are float32 [token blocks, channel blocks]; given ones are used, else they are computed from `x`.
    """
    level, scale, offset = _levels(x, inputs, scale, offset)
    grid = _format(inputs).grid
    if isinstance(grid, IntGrid):
        level = level.to(torch.int8 if grid.signed else torch.uint8)
    return level.view(x.shape), scale, offset


def round_inputs(x: Tensor, inputs: Inputs, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """The values that quantized inputs stand for, of the shape and type of `x` [..., channels].

    Computed in float32. Outlier columns come back as they are, and inputs that stay float do too.
    """
    if inputs.format is None or not x.numel():
        return x
    level, scale, offset = _levels(x, inputs, scale, offset)
    y = _spread(lambda q, s, z: q.mul_(s) if z is None else q.sub_(z).mul_(s), inputs.format, level, scale, offset)
    y = y.view(x.shape)
    if inputs.outliers is not None:
        y = torch.where(outlier_columns(x, inputs.outliers), x.to(torch.float32), y)
    return y.to(x.dtype)


def _format(inputs: Inputs) -> Format:
    if inputs.format is None:
        raise FormatError("float inputs have no levels; they are only divided")
    return inputs.format


def _levels(
    x: Tensor, inputs: Inputs, scale: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels float32 [tokens, channels], of memory that is ours, with their scale and offset."""
    fmt = _format(inputs)
    if inputs.static and scale is None:
        raise FormatError(f"{inputs} inputs have a stored scale, and none was given; calibrate the model first")
    x = x.reshape(-1, x.shape[-1]).to(torch.float32)
    if inputs.outliers is not None:
        x = x.masked_fill(outlier_columns(x, inputs.outliers), 0.0)
    if scale is None:
        scale, offset = range_to_scale(*_range(x, fmt), fmt)

    def level(v: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        v = v * inverse(s) if z is None else (v * inverse(s)).add_(z)
        return v.round_().clamp_(fmt.grid.lo, fmt.grid.hi) if isinstance(fmt.grid, IntGrid) else fmt.grid.round(v)

    return _spread(level, fmt, x, scale, offset), scale, offset


def _grouped(x: Tensor, fmt: Format) -> Tensor | None:
    """x as a view [tokens, channel blocks, block width] where blocks are rows or all rows and divide the width."""
    width = x.shape[1] if fmt.block.cols == -1 else fmt.block.cols
    whole = fmt.block.rows in (1, -1) and width and x.shape[1] % width == 0
    return x.view(x.shape[0], -1, width) if whole and x.numel() else None


def _range(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Least and largest value of every block, [token blocks, channel blocks]; of |x| alone where that is enough."""
    grouped = _grouped(x, fmt)
    if grouped is None:
        low, high = reduce_blocks(lambda b: (b.amin(1), b.amax(1)), fmt.block, x)
        return low[0], high[0]  # type: ignore[index]
    over = (2,) if fmt.block.rows == 1 else (0, 2)
    if fmt.offset is None:
        peak = grouped.abs().amax(over)
        peak = peak if fmt.block.rows == 1 else peak[None]
        return peak, peak
    low, high = grouped.amin(over), grouped.amax(over)
    return (low, high) if fmt.block.rows == 1 else (low[None], high[None])


def _spread(function: Callable[..., Tensor], fmt: Format, x: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """`function(values, scale, offset)` on every block of x [tokens, channels], float32."""
    grouped = _grouped(x, fmt)
    if grouped is not None:
        wide = None if offset is None else offset[:, :, None]
        return function(grouped, scale[:, :, None], wide).view(x.shape)

    def on_blocks(b: Tensor, s: Tensor, z: Tensor | None) -> Tensor:
        return function(b, s[:, None], None if z is None else z[:, None])

    shape = None if offset is None else offset[None]
    return map_blocks(on_blocks, fmt.block, x, scale[None], shape, dtype=torch.float32)
