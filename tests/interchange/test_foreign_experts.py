"""Other programs load the mixtures of experts that lowbit writes, and compute the same. Environments as in test_foreign_readers."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_models import save_model
from moe_models import MOE_MODELS
from test_foreign_readers import error, python_of, written

pytestmark = pytest.mark.peer


@pytest.fixture(scope="module", params=list(MOE_MODELS))
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(request.param)
    save_model(MOE_MODELS[request.param](), folder, spread=0.2)  # with less, experts hardly show in the logits
    return folder


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("vllm", "int4:g32"), ("vllm", "uint4:g32:asym"),
     ("vllm", "int4:g32,*.0.*experts*=keep"), ("vllm", "int4:g32,*.experts.*=keep"), ("gptq", "int4:g32,*.experts.*=keep"),
     ("gptq", "int4:g32"), ("awq", "uint4:g32:asym"), ("awq", "uint4:g32:asym,*.experts.*=keep")],
)  # fmt: skip
def test_vllm(mixture: Path, tmp_path: Path, target: str, recipe: str) -> None:
    python_of("vllm")
    folder, ours = written(mixture, recipe, target, tmp_path)
    try:
        assert error("vllm", "vllm_reader.py", folder, "auto", ours) < 4e-2
    except pytest.fail.Exception as failed:
        if "MoE backend supports" in str(failed):  # on x86 its int4 needs AMX
            pytest.skip("vLLM has no kernel of such experts for this processor")
        raise


# transformers takes the experts of all layers to be of one kind, without zero-points.
@pytest.mark.parametrize(
    ("recipe", "dtype", "within"),
    [("int4:g32", "float32", 1e-3), ("int8:channel", "float32", 1e-3), ("int8:channel,*experts*=int4:g32", "float32", 1e-3),
     ("mxfp4", "bfloat16", 5e-2)],
)  # fmt: skip
def test_compressed_tensors(mixture: Path, tmp_path: Path, recipe: str, dtype: str, within: float) -> None:
    python_of("transformers")
    folder, ours = written(mixture, recipe, "vllm", tmp_path)
    assert error("transformers", "transformers_reader.py", folder, dtype, ours) < within


@pytest.mark.parametrize("recipe", ["int4:g32", "int8:channel,*experts*=int4:g32"])
def test_gptqmodel(mixture: Path, tmp_path: Path, recipe: str) -> None:
    python_of("gptqmodel")
    if mixture.name.startswith("mixtral"):
        pytest.skip(
            "GPTQModel 7.6 wants Mixtral's experts under the names inside transformers, vLLM under the published ones"
        )
    folder, ours = written(mixture, recipe, "gptq", tmp_path)
    assert error("gptqmodel", "gptqmodel_reader.py", folder, "float16", ours) < 4e-2
