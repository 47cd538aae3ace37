"""What a stored number means: grids, blocks, stores, formats, and quantized tensors."""

from lowbit.formats.blocks import CHANNEL, TENSOR, Block, group
from lowbit.formats.format import Format, Offset
from lowbit.formats.grids import CodebookGrid, Fp8Grid, Grid, IntGrid, TableGrid
from lowbit.formats.inputs import InputQuantizer, Inputs, parse_inputs, quantize_inputs, round_inputs
from lowbit.formats.named_grids import parse_grid
from lowbit.formats.parsing import NAMED, parse_format
from lowbit.formats.qtensor import QTensor, encode

__all__ = [
    "CHANNEL", "NAMED", "TENSOR", "Block", "CodebookGrid", "Format", "Fp8Grid", "Grid", "InputQuantizer", "Inputs",
    "IntGrid", "Offset", "QTensor", "TableGrid", "encode", "group", "parse_format", "parse_grid", "parse_inputs",
    "quantize_inputs", "round_inputs",
]  # fmt: skip
