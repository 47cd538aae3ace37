"""How a scale or an offset that is stored in few bits of its own is read, as one sentence with its numbers."""

from __future__ import annotations

from lowbit.formats import Format, QTensor, stores
from lowbit.report.wording import number_text as num


def kept_text(q: QTensor, part: str, place: tuple[int, int]) -> str:
    """Of the block at `place` in the first matrix; empty where the part is a plain float or integer."""
    stored = getattr(q, part)
    how = q.format.scale if part == "scale" else (q.format.offset.store if q.format.offset else None)
    across = q.format.block.counts(q.shape)[2]
    at = place[0] * across + place[1]
    if isinstance(stored, QTensor) and isinstance(how, Format):
        return _nested(stored, how, at, part) + _power(q)
    if stored is None or how not in ("e8m0", "e4m3"):
        return ""
    byte = int(stored.reshape(-1)[at])
    value = float(stores.from_store(stored.reshape(-1)[at], str(how)))
    if how == "e8m0":
        return f"one byte holds the exponent: byte {byte} = 2^({byte} - 127) = {num(value, 7)}" + _power(q)
    return (
        f"one byte holds an fp8 number (e4m3: a sign, 4 bits of exponent, 3 of mantissa): byte {byte} = {num(value, 7)}"
        + _power(q)
    )


def _nested(inner: QTensor, how: Format, at: int, part: str) -> str:
    """A code of the format `how`, and the scale that it shares."""
    code = int(inner.unpacked().reshape(-1)[at])
    level = float(how.grid.decode(inner.unpacked().reshape(-1)[at : at + 1])[0])
    size = how.block.cols
    scales = inner.scales()
    assert scales is not None
    place = 0 if size == -1 else at // size
    scale = float(scales.reshape(-1)[place])
    offsets, value = inner.offsets(), float(inner.dequantize().reshape(-1)[at])
    what = "minima" if part == "offset" else "scales"
    shared = f"all {what} of the tensor" if size == -1 else f"{size} {what}"
    read = f"{num(level)} x {num(scale, 7)}"
    if offsets is not None:
        zero = float(offsets.reshape(-1)[place])
        read = (
            f"{num(scale, 7)} x ({num(level)} - {num(zero, 7)})"
            if how.offset_kind != "min"
            else f"{read} + {num(zero, 7)}"
        )
    named = f"code {code}" + (f", level {num(level)}" if float(code) != level else "")
    deeper = "" if isinstance(how.scale, str) else f" ({how.scale})"
    spelled = " (fp8: a sign, 4 bits of exponent, 3 of mantissa), " if str(how.grid) == "e4m3" else ", "
    store = how.scale if isinstance(how.scale, str) else "few bits again"
    return (
        f"the {part if part == 'scale' else 'minimum'} is a code of its own, {named} in {how.grid}{spelled}times a second scale for {shared} "
        f"({store}{deeper}): {read} = {num(value, 7)}"
    )


def _power(q: QTensor) -> str:
    return f", times 2^{q.format.exponent} of the whole weight" if q.format.exponent else ""
