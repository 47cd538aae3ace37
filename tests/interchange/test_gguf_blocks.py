"""Blocks of GGUF taken apart: bit for bit the values of the gguf package, for random bytes in every block."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from lowbit.formats import parse_format
from lowbit.interchange.layouts.gguf import FORMATS, UNPACK
from lowbit.interchange.readers.gguf.blocks import is_quantized, stored_weight


@pytest.mark.parametrize("kind", FORMATS)
def test_random_blocks_have_the_values_of_the_gguf_package(kind: str) -> None:
    ggml_type = GGMLQuantizationType[kind]
    count, size = GGML_QUANT_SIZES[ggml_type]
    rows, width = 6, 2 * max(count, 64)
    generator = np.random.default_rng(len(kind))
    raw = generator.integers(0, 256, (rows * width // count, size), dtype=np.uint8)
    halves = {
        "Q2_K": (80, 82),
        "Q3_K": (108,),
        "Q6_K": (208,),
        "Q4_1": (0, 2),
        "Q5_1": (0, 2),
        "Q4_K": (0, 2),
        "Q5_K": (0, 2),
    }
    for at in halves.get(kind, (0,)) if kind != "MXFP4" else ():  # an exponent of all ones would be no number
        scales = generator.normal(0, 0.02, len(raw)).astype(np.float16)
        raw[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    if kind == "MXFP4":
        raw[:, 0] = generator.integers(2, 254, len(raw))
    wanted = torch.from_numpy(dequantize(raw.reshape(rows, -1), ggml_type))
    stored = stored_weight("w", int(ggml_type), (rows, width))
    assert stored.quantized is not None and stored.format == parse_format(FORMATS[kind])
    q = stored.quantized(lambda name: torch.from_numpy(raw.reshape(rows, -1)))
    assert wanted.isfinite().all() and torch.equal(q.dequantize(), wanted)
    assert q.nbytes == pytest.approx(raw.size, rel=0.06)  # two-level scales of 6 bits are packed as densely


def test_the_tables_name_the_same_types() -> None:
    assert FORMATS.keys() == UNPACK.keys()
    assert is_quantized(int(GGMLQuantizationType.IQ2_XXS)) and not is_quantized(int(GGMLQuantizationType.BF16))
    other = stored_weight("w", int(GGMLQuantizationType.IQ2_XXS), (2, 256))
    assert other.quantized is None and "IQ2_XXS" in other.why
