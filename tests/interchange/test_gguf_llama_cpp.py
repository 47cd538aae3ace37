"""llama.cpp itself reads what lowbit wrote: every block type, every family, tokens, and its own way of computing.

Needs `pip install xllamacpp`; run with `-m peer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf_models import FAMILY_MODELS, faint_of, save_model
from llama_cpp_reader import LlamaCpp
from moe_models import MOE_MODELS

import lowbit
from lowbit.interchange.exporters.gguf.types import TYPES
from tiny import _ROPE, VOCAB

pytestmark = pytest.mark.peer
pytest.importorskip("xllamacpp")
# ggml looks GELU up in a table of float16; gemma3 has a norm behind every matrix, which makes a faint one loud again.
NEAR = {"gpt2": 5e-4, "phi": 5e-4, "gemma": 5e-4, "gemma2": 1e-3, "gemma3": 1e-2}
TEXT = "the hen and an inn in the tree"


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama-cpp")


def apart(folder: Path, file: Path) -> float:
    """|theirs - ours| / |ours| of the centred logits after a text, whose tokens must be the same."""
    llama = LlamaCpp(file)
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    assert llama.tokens(TEXT) == ids
    found = llama.log_probabilities(ids, VOCAB)
    with torch.inference_mode():
        logits = lowbit.load(folder, dtype=torch.float32, kernel="dense")(torch.tensor([ids])).logits[0, -1]
    assert bool(found.isfinite().all())
    ours = logits - logits.mean()
    return float((found - found.mean() - ours).norm() / ours.norm())


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_is_computed_alike_in_float32(room: Path, name: str) -> None:
    """Only one faint matrix is in few bits, so that a wrong order of rows, position, norm or constant would show."""
    faint = faint_of(name)
    save_model(FAMILY_MODELS[name](), room / name, spread=0.3, faint=faint)
    lowbit.quantize(room / name, f"q8_0,embed=keep,*=keep,{faint}=q8_0", room / f"{name}-q")
    made = lowbit.export(room / f"{name}-q", "gguf")
    assert apart(room / f"{name}-q", made.path) < NEAR.get(name, 1e-4)


_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FACTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}}),
    "yarn": ("Llama", {"rope_parameters": _YARN}),
    "yarn-magnitude": ("Llama", {"rope_parameters": {**_YARN, "attention_factor": 0.6}}),
    "yarn-mscale": ("Qwen2", {"rope_parameters": {**_YARN, "mscale": 0.5, "mscale_all_dim": 0.9}}),
    "odd-llama3": ("Llama", {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 5000.0, "factor": 3.3, "low_freq_factor": 0.7, "high_freq_factor": 9.0,
        "original_max_position_embeddings": 50}}),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_the_config_mean_the_same_to_llama_cpp(room: Path, name: str) -> None:
    """Scaled positions and biases, with everything but one faint matrix in float32."""
    kind, values = FACTS[name]
    config = getattr(transformers, f"{kind}Config")(architectures=[f"{kind}ForCausalLM"], **(_ROPE | values))
    faint = faint_of("llama")
    save_model(config, room / name, spread=0.3, faint=faint)
    lowbit.quantize(room / name, f"q8_0,embed=keep,*=keep,{faint}=q8_0", room / f"{name}-q")
    made = lowbit.export(room / f"{name}-q", "gguf")
    assert apart(room / f"{name}-q", made.path) < 1e-4


def wide(room: Path) -> Path:
    if not (room / "wide").exists():
        sizes: dict[str, Any] = _ROPE | {"hidden_size": 256, "intermediate_size": 512}
        save_model(transformers.LlamaConfig(architectures=["LlamaForCausalLM"], **sizes), room / "wide", spread=0.1)
    return room / "wide"


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_block_type_is_read_alike(room: Path, kind: Any) -> None:
    """llama.cpp rounds the inputs of products to 8 bits in groups, which is what is left of the difference."""
    folder = room / f"wide-{kind.name}"
    lowbit.quantize(wide(room), f"{kind.text},embed=q8_0", folder)
    made = lowbit.export(folder, "gguf")
    assert apart(folder, made.path) < 0.03


@pytest.mark.parametrize("kind", ["q6_k", "q4_0", "iq4_nl", "mxfp4"])
def test_embeddings_of_other_types(room: Path, kind: str) -> None:
    folder = room / f"embed-{kind}"
    lowbit.quantize(wide(room), f"q8_0,embed={kind}", folder)
    assert apart(folder, lowbit.export(folder, "gguf").path) < 0.03


def test_a_mix_is_what_llama_cpp_calls_it(room: Path) -> None:
    from lowbit.convert.quantize_as import prepare, quantized_as

    ready = prepare(wide(room), "q4_k_m", "gguf")
    with quantized_as(wide(room), ready, room / "mix.gguf", keep=room / "mix") as (_, made):
        assert apart(room / "mix", made.path) < 0.03


def moe_faint(name: str) -> str:
    """A stack after which nothing brings it back to size."""
    return "model.layers.0.mlp.experts.down_proj"


@pytest.mark.parametrize("name", MOE_MODELS)
def test_every_mixture_of_experts_is_computed_alike_in_float32(room: Path, name: str) -> None:
    """One faint stack in few bits: a wrong expert, half, router or shared expert would show in the other layers."""
    faint = moe_faint(name)
    save_model(MOE_MODELS[name](), room / name, spread=0.2, faint=faint)
    lowbit.quantize(room / name, f"q8_0,embed=keep,*=keep,{faint}=q8_0", room / f"{name}-q")
    made = lowbit.export(room / f"{name}-q", "gguf")
    assert apart(room / f"{name}-q", made.path) < 1e-4


@pytest.mark.parametrize("name", MOE_MODELS)
@pytest.mark.parametrize("kind", ["q4_0", "iq4_nl", "q8_0"])
def test_quantized_experts_are_read_alike(room: Path, name: str, kind: str) -> None:
    """Routers choose by what the layers before give: int8 inputs may tip a choice, which the few seeds here do not."""
    folder = room / f"{name}-{kind}"
    if not (room / f"{name}-plain").exists():
        save_model(MOE_MODELS[name](), room / f"{name}-plain", spread=0.1)
    lowbit.quantize(room / f"{name}-plain", f"{kind},embed=q8_0", folder)
    assert apart(folder, lowbit.export(folder, "gguf").path) < 0.03
