"""Grids by name, as formats write them, and the tables of levels that others published."""

from __future__ import annotations

from lowbit.errors import FormatError, nearest
from lowbit.formats.grids import CodebookGrid, Fp8Grid, Grid, IntGrid, TableGrid


def _e2m1() -> tuple[float, ...]:
    """OCP MX 1.0, section 5.3.3: sign, two exponent bits (bias 1), one mantissa bit."""
    positive = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    return positive + tuple(-v for v in positive)


# QLoRA (Dettmers et al. 2023), appendix E: quantiles of N(0, 1) on [-1, 1] with an exact zero.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip

# bitsandbytes' fp4, in twelfths: a sign, and eight magnitudes of which the smallest but zero is far below the next.
_BNB_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

# ggml's kvalues_iq4nl: sixteen int8 levels, denser in the middle, that a byte shuffle can look up.
_IQ4NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

TABLES: dict[str, TableGrid] = {
    grid.name: grid
    for grid in (
        TableGrid("binary", (-1.0, 1.0)),
        TableGrid("ternary", (-1.0, 0.0, 1.0)),
        TableGrid("e2m1", _e2m1()),
        TableGrid("nf4", _NF4),
        TableGrid("bnb_fp4", tuple(sign * v / 12 for sign in (1.0, -1.0) for v in _BNB_FP4)),
        TableGrid("iq4nl", tuple(float(v) for v in _IQ4NL)),
    )
}


def grid_names() -> list[str]:
    """Every grid name that `parse_grid` knows."""
    ints = [f"{kind}{bits}" for kind in ("int", "uint", "kmeans") for bits in range(1, 9)]
    return [*ints, "e4m3", "e5m2", *TABLES]


def parse_grid(name: str, narrow: bool = False) -> Grid:
    """The grid called `name`; FormatError with the nearest names if there is none."""
    if name in TABLES:
        grid: Grid = TABLES[name]
    elif name in ("e4m3", "fp8"):
        grid = Fp8Grid(3)
    elif name == "e5m2":
        grid = Fp8Grid(2)
    elif name == "fp4":
        grid = TABLES["e2m1"]
    elif name.isascii() and name[-1:].isdigit() and name[:-1] in ("int", "uint", "kmeans"):
        bits = int(name[-1])
        if name.startswith("kmeans"):
            grid = CodebookGrid(bits)
        else:
            return IntGrid(bits, is_signed=name.startswith("int"), narrow=narrow)
    else:
        raise FormatError(f"unknown grid {name!r}{nearest(name, grid_names())}")
    if narrow:
        raise FormatError(f"'narrow' is for signed integer grids, not for {name!r}")
    return grid
