"""Which of our formats each ggml type is, and what comes nearest to those that none is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from lowbit.formats import CodebookGrid, Format, parse_format
from lowbit.formats.parsing import NAMED
from lowbit.interchange.exporters.common.relayout import can_be
from lowbit.interchange.exporters.gguf import blocks, kquants
from lowbit.interchange.exporters.gguf.blocks import Packer


@dataclass(frozen=True)
class BlockType:
    """A ggml type of blocks: its name, our text for it, the weights of a block, and what packs a row of them.

    `narrow`: what takes its place where rows are no multiple of the block: a type of blocks of 32 of about the size, or the
    smallest there is.
    """

    name: str
    text: str
    size: int
    pack: Packer
    narrow: str = ""

    @property
    def format(self) -> Format:
        return parse_format(self.text)


# llama-quantize gives rows that are no multiple of 256 the next larger type of 32 with a uniform grid (Q4_K -> Q5_0,
# Q6_K -> Q8_0), which is a bit or two more than was asked for. These stay near the size.
TYPES: tuple[BlockType, ...] = (
    BlockType("Q4_0", "q4_0", 32, blocks.four_bits),
    BlockType("Q4_1", "q4_1", 32, blocks.four_bits_and_minimum),
    BlockType("Q5_0", "q5_0", 32, blocks.five_bits),
    BlockType("Q5_1", "q5_1", 32, blocks.five_bits),
    BlockType("Q8_0", "q8_0", 32, blocks.eight_bits),
    BlockType("IQ4_NL", "iq4_nl", 32, blocks.four_bits),
    BlockType("MXFP4", "mxfp4", 32, blocks.four_bits),
    BlockType("Q2_K", "q2_k", 256, kquants.q2_k, "iq4_nl"),
    BlockType("Q3_K", "q3_k", 256, kquants.q3_k, "iq4_nl"),
    BlockType("Q4_K", "q4_k", 256, kquants.q4_k, "iq4_nl"),
    BlockType("Q5_K", "q5_k", 256, kquants.q5_k, "q5_0"),
    BlockType("Q6_K", "q6_k", 256, kquants.q6_k, "q5_1"),
    BlockType("IQ4_XS", "iq4_xs", 256, kquants.iq4_xs, "iq4_nl"),
)


@lru_cache(maxsize=1)
def _by_format() -> dict[Format, BlockType]:
    return {kind.format: kind for kind in TYPES}


def type_of(fmt: Format) -> BlockType | None:
    """The ggml type that holds exactly this format, or None."""
    return _by_format().get(fmt.plain)


def type_with_codes(fmt: Format, shape: tuple[int, ...], wider: bool) -> BlockType | None:
    """The smallest type of blocks of 32 that holds the codes of a weight [..., out, in] with its scales repeated; in more bits
    than the codes have only where they may be `wider`. None where there is none."""
    same = [t for t in TYPES if t.size == 32 and (wider or t.format.grid.bits == fmt.grid.bits)]
    fitting = [t for t in same if can_be(fmt, t.format, shape)]
    return min(fitting, key=lambda t: t.format.nbytes(shape), default=None)


def nearest_type(fmt: Format) -> BlockType:
    """The type that a person would take in place of a format that none is: as many bits, an offset where there was one,
    uneven levels where the grid has them. One of blocks of 32, which most widths are a multiple of."""
    named = {kind.text: kind for kind in TYPES}
    bits = fmt.grid.bits
    uneven = isinstance(fmt.grid, CodebookGrid) or fmt.grid.name in ("nf4", "e2m1")
    if bits > 5:
        return named["q8_0"]
    if bits == 5:
        return named["q5_1" if fmt.offset is not None else "q5_0"]
    if fmt.grid.name == "e2m1" and fmt.block.cols == 32:
        return named["mxfp4"]
    if uneven or bits < 4:
        return named["iq4_nl"]
    return named["q4_1" if fmt.offset is not None else "q4_0"]


def text_of(kind: BlockType) -> str:
    """A type as a recipe writes it: the name where we have one of that name."""
    return kind.text if kind.text in NAMED else str(kind.format)
