"""An embedding model keeps what sentence-transformers reads beside its weights, and loads there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.nn.swap import packed_weights
from tiny import save_tiny

# The files of Qwen3-Embedding, by their names and what is in them.
FILES: dict[str, Any] = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 32, "pooling_mode_lasttoken": True, "pooling_mode_cls_token": False,
                              "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False, "include_prompt": True},
    "config_sentence_transformers.json": {"prompts": {"query": "find: ", "document": ""}, "similarity_fn_name": "cosine"},
}  # fmt: skip
TEXTS = ["the man", "an inner thing", "then"]


@pytest.fixture
def original(tmp_path: Path) -> Path:
    folder = tmp_path / "float"
    model = save_tiny("qwen3", folder)
    # Saved as Qwen3-Embedding is: without a head, and with the name of the class that has one.
    model.model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder


def test_the_side_files_come_along_and_the_model_without_a_head_loads(original: Path, tmp_path: Path) -> None:
    lowbit.quantize(original, "int8:g32", tmp_path / "w8")
    for name, content in FILES.items():
        assert json.loads((tmp_path / "w8" / name).read_text()) == content
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "w8", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()) and type(model) is transformers.Qwen3Model
    truth = transformers.AutoModel.from_pretrained(original, dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found, wanted = model(ids)[0], truth(ids)[0]
    assert (found - wanted).norm() < 0.02 * wanted.norm()


def test_sentence_transformers_loads_it(original: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer

    lowbit.quantize(original, "int8:g32", tmp_path / "w8")
    model = SentenceTransformer(str(tmp_path / "w8"), device="cpu", model_kwargs={"dtype": torch.float32})
    assert list(packed_weights(model)) and model.prompts["query"] == "find: "
    truth = SentenceTransformer(str(original), device="cpu", model_kwargs={"dtype": torch.float32})
    for options in ({}, {"prompt_name": "query"}):
        found, wanted = (torch.tensor(m.encode(TEXTS, **options)) for m in (model, truth))
        assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.999
    half = torch.tensor(model.half().encode(TEXTS).astype("float32"))
    assert torch.nn.functional.cosine_similarity(half, torch.tensor(truth.encode(TEXTS))).min() > 0.99
    model.float().save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert (tmp_path / "again/1_Pooling/config.json").is_file() and "sentence_transformers" in sys.modules
    assert torch.allclose(torch.tensor(again.encode(TEXTS)), torch.tensor(model.encode(TEXTS)), atol=1e-5)
