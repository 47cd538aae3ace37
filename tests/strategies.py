"""Random formats, shapes and tensors for the property tests."""

from __future__ import annotations

import math

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lowbit.formats import CHANNEL, TENSOR, Block, CodebookGrid, Format, IntGrid, Offset, parse_grid

FIXED_GRIDS = [
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 9)),
    "ternary", "binary", "e4m3", "e5m2", "e2m1", "nf4", "iq4nl",
]  # fmt: skip
BLOCKS = [TENSOR, CHANNEL, *(Block(*b) for b in ((1, 1), (1, 3), (1, 8), (1, 32), (2, 3), (4, 4), (-1, 4), (3, -1)))]
# What a scale is kept in when a test builds a QTensor from random parts.
NESTED = [
    Format(parse_grid("uint8"), Block(1, 8), "fp32"),
    Format(parse_grid("e4m3"), TENSOR, "fp32"),
    Format(parse_grid("uint6"), Block(1, 4), "fp16"),
    Format(parse_grid("int6"), Block(1, 4), Format(parse_grid("e4m3"), TENSOR, "bf16")),
    Format(parse_grid("uint4"), Block(1, 5), "fp16", Offset("min", "fp16")),
    Format(parse_grid("uint5"), CHANNEL, "fp32", Offset("zero", "grid")),
]


settings.register_profile("nightly")


def steady(examples: int) -> settings:
    """The same examples at every run, and no deadline: machines are noisy.

    A third of them at every change, all of them with `--hypothesis-profile=nightly`, as the nightly run has it.
    """
    nightly = settings.get_current_profile_name() == "nightly"
    return settings(max_examples=examples if nightly else max(10, examples // 3), deadline=None, derandomize=True)


def grids() -> st.SearchStrategy:
    """Every grid with fixed levels, narrow ones too."""
    narrow = st.integers(2, 8).map(lambda bits: IntGrid(bits, narrow=True))
    return st.sampled_from([parse_grid(name) for name in FIXED_GRIDS]) | narrow


def offsets() -> st.SearchStrategy:
    """Every kind of offset, in every store."""
    plain = [Offset("zero", "grid"), Offset("zero", "int32")]
    floats = [Offset(kind, store) for kind in ("float", "min") for store in ("fp32", "fp16", "bf16")]
    nested = [Offset("min", f) for f in NESTED if f.grid.signed or f.offset is not None]
    return st.sampled_from(plain + floats + nested)


@st.composite
def formats(draw: st.DrawFn) -> Format:
    """Any format whose text form can be written."""
    block = draw(st.sampled_from(BLOCKS))
    scale = draw(st.sampled_from(["fp32", "fp16", "bf16", "e8m0", "e4m3", *NESTED]))
    if draw(st.integers(0, 4)) == 0:
        grid = CodebookGrid(draw(st.integers(1, 8)))
        levels = draw(st.sampled_from(["fp32", "fp16", "bf16"]))
        if draw(st.booleans()):
            return Format(grid, block, None, None, block, levels)
        return Format(grid, block, scale, None, draw(st.sampled_from(BLOCKS)), levels)
    grid = draw(grids())
    offset = draw(st.none() | offsets()) if isinstance(grid, IntGrid) else None
    return Format(grid, block, scale, offset)


def shapes(least: int = 0, most: int = 3) -> st.SearchStrategy:
    """Shapes of 0 to 3 dimensions; `least` is the smallest size of a dimension."""
    sizes = st.integers(least, 9) | st.sampled_from([16, 33])
    return st.lists(sizes, min_size=0, max_size=most).map(tuple).filter(lambda s: math.prod(s) <= 4000)


def normal(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> Tensor:
    """float32 normal values with a few zeros and outliers among them, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * spread
    pick = torch.rand(shape, generator=generator)
    x = torch.where(pick < 0.05, torch.zeros_like(x), x)
    return torch.where(pick > 0.97, x * 5, x)


def random_parts(fmt: Format, shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """Parts that a QTensor of this format could have: codes within the grid, small finite scales."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, (dtype, size) in fmt.parts(shape).items():
        if dtype == torch.uint8:  # every byte below 127 is a valid code, fp8 pattern and exponent
            out[name] = torch.randint(0, 100, size, dtype=torch.uint8, generator=generator)
        elif dtype == torch.int32:
            out[name] = torch.randint(-200, 200, size, dtype=torch.int32, generator=generator)
        else:
            out[name] = torch.randn(size, generator=generator).sort(-1).values.to(dtype)
    return out


class Weighing:
    """Statistics of which only the importance is known: any weight for each element."""

    def __init__(self, importance: torch.Tensor) -> None:
        self.importance = importance


def weighing(v: torch.Tensor | None) -> Weighing | None:
    """`v` as a solver takes it."""
    return None if v is None else Weighing(v)
