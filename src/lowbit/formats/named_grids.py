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

# Max 1960, "Quantizing for minimum distortion": the levels with the least mean square error for N(0, 1), here those above zero
# in whole numbers within 127, which kernels hold as int8 exactly. The factor is the one, of those that leave all levels
# apart, that loses least by it: 0.06 % of the error up to 4 bits, 0.6 % at 5, 3 % at 6, 18 % at 7. With 8 bits there
# are no more whole numbers to choose among than int8 has.
_NORMAL = {
    1: (127,),
    2: (33, 110),
    3: (13, 40, 71, 114),
    4: (5, 15, 25, 36, 48, 62, 79, 104),
    5: (2, 6, 10, 14, 18, 22, 26, 31, 36, 41, 47, 53, 60, 68, 79, 96),
    6: (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 32, 34, 37, 39, 42, 45, 48, 51, 54, 58, 62, 66, 71,
        77, 84, 93, 108),
    7: (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29, 30,
        31, 33, 34, 35, 36, 38, 39, 40, 42, 43, 45, 46, 48, 49, 51, 52, 54, 56, 58, 60, 62, 64, 66, 68, 71, 73, 76,
        79, 83, 87, 91, 96, 103, 111, 125),
}  # fmt: skip

TABLES: dict[str, TableGrid] = {
    grid.name: grid
    for grid in (
        TableGrid("binary", (-1.0, 1.0)),
        TableGrid("ternary", (-1.0, 0.0, 1.0)),
        TableGrid("e2m1", _e2m1()),
        TableGrid("nf4", _NF4),
        TableGrid("bnb_fp4", tuple(sign * v / 12 for sign in (1.0, -1.0) for v in _BNB_FP4)),
        TableGrid("iq4nl", tuple(float(v) for v in _IQ4NL)),
        *(
            TableGrid(f"normal{bits}", (*(-float(v) for v in reversed(above)), *map(float, above)))
            for bits, above in _NORMAL.items()
        ),
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
