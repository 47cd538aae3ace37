"""Other programs load the mixtures of experts that lowbit writes, and compute the same. Environments as in test_foreign_readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import save_model
from moe_models import MOE_MODELS
from test_foreign_readers import apart, python_of, read, written

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=list(MOE_MODELS))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_model(MOE_MODELS[request.param](), folder)
    return folder


@pytest.mark.parametrize("recipe", ["int4:g32", "uint4:g32:asym", "int8:channel,*experts*=int4:g32", "int4:g32,*.0.*experts*=keep"])
def test_vllm(mixture: Path, tmp_path: Path, recipe: str) -> None:
    python_of("vllm")
    folder, ours = written(mixture, recipe, "vllm", tmp_path)
    found, last = read("vllm", "vllm_reader.py", folder, "auto")["logprobs"], ours[:, -1]
    assert apart(found - found.mean(1, True), last - last.mean(1, True)) < 4e-2


@pytest.mark.parametrize("recipe", ["int4:g32", "int8:channel", "int4:g32,*.0.*experts*=keep"])
def test_compressed_tensors(mixture: Path, tmp_path: Path, recipe: str) -> None:
    python_of("transformers")
    folder, ours = written(mixture, recipe, "vllm", tmp_path)
    assert apart(read("transformers", "transformers_reader.py", folder, "float32")["logits"], ours) < 1e-3


@pytest.mark.parametrize(("target", "recipe"), [("gptq", "int4:g32"), ("awq", "uint4:g32:asym")])
def test_vllm_reads_the_older_layouts(mixture: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("vllm")
    folder, ours = written(mixture, recipe, target, tmp_path)
    found, last = read("vllm", "vllm_reader.py", folder, "auto")["logprobs"], ours[:, -1]
    assert apart(found - found.mean(1, True), last - last.mean(1, True)) < 4e-2
