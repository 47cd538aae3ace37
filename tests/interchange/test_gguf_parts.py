"""Models that llama.cpp has split into several GGUF files."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest
import torch
from gguf_models import FAMILY_MODELS, save_model

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.opening import open_source


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("parts")
    save_model(FAMILY_MODELS["llama"](), room / "float")
    lowbit.quantize(room / "float", "q4_0,embed=q8_0", room / "q")
    return lowbit.export(room / "q", "gguf", room / "whole.gguf").path


def split(whole: Path, out: Path, each: int) -> list[Path]:
    """By llama.cpp's own writer, `each` tensors to a file; the head, which tells tied models from others, in the last."""
    reader = gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(
        out / "model.gguf", reader.fields["general.architecture"].contents(), split_max_tensors=each
    )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            )
    for tensor in sorted(reader.tensors, key=lambda t: t.name == "output.weight"):
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(out.glob("model-*.gguf"))


@pytest.mark.parametrize("which", [0, 1, -1])
def test_any_part_opens_the_model(whole: Path, tmp_path: Path, which: int) -> None:
    parts = split(whole, tmp_path, 7)
    assert len(parts) == 3
    one, many = open_source(whole), open_source(parts[which])
    assert list(one.inventory.tied) == list(many.inventory.tied) == []
    assert one.tensors.keys() == many.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name), many.read(name))
    stored = many.stored_as("model.layers.1.mlp.down_proj.weight")
    assert stored is not None and stored.read is not None and str(stored.format) == "int4:g32"
    assert many.disk_bytes() == sum(p.stat().st_size for p in parts)
    assert set(many.identity()["files"]) == {p.name for p in parts}
    text = "the hen"
    assert many.tokenizer()(text)["input_ids"] == one.tokenizer()(text)["input_ids"]


def test_a_split_model_computes_the_same(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path, 7)
    ids = torch.arange(3, 23)[None]
    with torch.inference_mode():
        one, many = (open_source(p).load_float()(input_ids=ids).logits for p in (whole, parts[0]))
    assert torch.equal(one, many)


def test_a_missing_part_is_named(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path, 7)
    parts[1].unlink()
    with pytest.raises(SourceError, match=r"one of the 3 parts .*model-00002-of-00003\.gguf is not beside it"):
        open_source(parts[0])


def test_names_and_numbers_of_parts_are_checked(whole: Path, tmp_path: Path) -> None:
    parts = split(whole, tmp_path, 7)
    shutil.copy(parts[0], tmp_path / "other.gguf")
    with pytest.raises(SourceError, match="give the files their names back"):
        open_source(tmp_path / "other.gguf")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(SourceError, match=r"says it is part 2 \(from 0\) of 3"):
        open_source(parts[0])
