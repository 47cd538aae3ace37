"""The tensor table of GGUF against the `gguf` package's, and damaged files."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest

from lowbit.interchange.gguf_table import read_table

TYPES = ("F32", "F16", "Q4_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4", "Q6_K")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "x.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(1)
    out.add_token_list(["a", "b", "cc"])
    out.add_array("x.numbers", [1, 2, 3])
    out.add_float32("x.f", 1.5)
    for i, name in enumerate(TYPES):
        kind = gguf.GGMLQuantizationType[name]
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        data = np.random.default_rng(i).integers(0, 255, (3, 512 // block * nbytes), dtype=np.uint8)
        out.add_tensor(f"t.{name}", data, raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_the_table_is_that_of_the_gguf_package(file: Path) -> None:
    architecture, found = read_table(file)
    assert architecture == "llama" and len(found) == len(TYPES)
    for tensor in gguf.GGUFReader(file).tensors:
        ours = found[tensor.name]
        assert (ours.offset, ours.nbytes, ours.ggml_type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert ours.shape == tuple(int(size) for size in reversed(tensor.shape))


def test_files_that_are_cut_short_say_so(file: Path, tmp_path: Path) -> None:
    raw, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for length in (0, 3, 23, 24, 60, 200, len(raw) // 2, len(raw) - 40):
        cut.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="truncated|too few|ends at|more than it has"):
            read_table(cut)


def test_mutated_headers_give_an_error_or_a_table_inside_the_file(file: Path, tmp_path: Path) -> None:
    raw, generator, mutant = file.read_bytes(), random.Random(0), tmp_path / "mutant.gguf"
    header = next(iter(sorted(t.offset for t in read_table(file)[1].values())))
    refused = 0
    for _ in range(600):
        bad = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(header)
            bad[at : at + generator.choice((1, 4, 8))] = generator.randbytes(generator.choice((1, 4, 8)))
        mutant.write_bytes(bad)
        try:
            _, found = read_table(mutant)
        except ValueError:
            refused += 1
            continue
        assert all(t.offset + t.nbytes <= len(bad) and t.nbytes >= 0 for t in found.values())
    assert refused > 300
