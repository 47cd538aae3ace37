"""Models that transformers keeps in float32 here and there, in float16 and bfloat16; and the casts of a packed model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import lowbit
from lowbit.kernels.dispatch import Dispatcher
from lowbit.nn.swap import packed_weights
from tiny import VOCAB, tiny_model

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def _blip2() -> Any:
    config = transformers.Blip2Config(
        vision_config=SMALL | {"image_size": 16, "patch_size": 8},
        qformer_config=SMALL | {"vocab_size": VOCAB, "encoder_hidden_size": 32},
        text_config={"model_type": "opt", "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 1,
                     "num_attention_heads": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
        num_query_tokens=4, image_token_index=120,
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config)


def _mt5() -> Any:
    config = transformers.MT5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return transformers.MT5ForConditionalGeneration(config)


KINDS = {"t5": lambda: tiny_model("t5"), "mt5": _mt5, "blip2": _blip2}
INPUTS: dict[str, dict[str, Tensor]] = {
    "t5": {"input_ids": torch.arange(5, 15)[None], "decoder_input_ids": torch.arange(3)[None]},
    "blip2": {"input_ids": torch.tensor([[120] * 4 + [7, 8, 9]]), "pixel_values": torch.ones(1, 3, 16, 16) / 2},
}


def logits(model: Any, kind: str) -> Tensor:
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in INPUTS.get(kind, INPUTS["t5"]).items()}
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A folder of int8 weights made of a float16 checkpoint, with its float16 original beside it."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    KINDS[request.param]().half().save_pretrained(root / "float16")
    lowbit.quantize(root / "float16", "int8:channel", root / "w8")
    return request.param, root


@pytest.mark.parametrize("dtype", [torch.float16, "auto", torch.bfloat16])
def test_a_float16_checkpoint_runs_as_its_float_original_does(made: tuple[str, Path], dtype: Any) -> None:
    kind, root = made
    cls = type(KINDS[kind]())
    model, info = cls.from_pretrained(root / "w8", dtype=dtype, output_loading_info=True)
    truth = cls.from_pretrained(root / "float16", dtype=dtype)
    assert not any(info.values()), info
    packed = dict(packed_weights(model))
    for name, weight in packed.items():
        assert weight.dtype == truth.get_parameter(name).dtype, name
        assert {k: (p.dtype, p.shape) for k, p in weight.qtensor().parts().items()} == {
            k: (d, torch.Size(s)) for k, (d, s) in weight.format.parts(weight.stored_shape).items()
        }
        with torch.no_grad():
            truth.get_parameter(name).copy_(weight.dequantize())
        weight.dispatcher = Dispatcher("expand")
    for name, param in model.named_parameters():
        assert param.numel() == 0 or param.dtype == truth.get_parameter(name).dtype, name
    found, wanted = logits(model, kind), logits(truth, kind)
    assert found.dtype == wanted.dtype and found.isfinite().all()
    assert (found.float() - wanted.float()).norm() < 2e-2 * wanted.float().norm()
    ids = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in INPUTS.get(kind, INPUTS["t5"]).items()}
    ids.pop("decoder_input_ids", None)
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_what_leaves_the_range_of_float16_is_computed_in_float32(tmp_path: Path) -> None:
    source = tiny_model("t5")
    with torch.no_grad():
        for name, param in source.named_parameters():
            if ".wi." in name or ".wo." in name:
                param.mul_(3e3 if ".wo." in name else 30)
    source.save_pretrained(tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int8:channel", tmp_path / "w8")
    cls = transformers.T5ForConditionalGeneration
    exact = logits(cls.from_pretrained(tmp_path / "w8", dtype=torch.float32), "t5")
    found = logits(cls.from_pretrained(tmp_path / "w8", dtype=torch.float16), "t5")
    assert (found.float() - exact).norm() < 2e-2 * exact.norm()


@pytest.mark.parametrize("in_memory", [False, True], ids=["folder", "memory"])
@pytest.mark.parametrize("cast", ["half", "float", "bfloat16", "double"])
def test_casts_are_those_of_to(cast: str, in_memory: bool, packed_folder: Any) -> None:
    dtype = {"half": torch.float16, "float": torch.float32, "bfloat16": torch.bfloat16, "double": torch.float64}[cast]
    if in_memory:
        model: Any = lowbit.quantize(tiny_model("qwen3"), "search@int4:g32").model
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(packed_folder("qwen3", "search@int4:g32"))
    other = copy.deepcopy(model).to(dtype)
    parts = {name: weight.qtensor().parts() for name, weight in packed_weights(model)}
    twin = copy.deepcopy(model)
    assert getattr(model, cast)() is model and model.dtype == dtype
    assert twin.dtype == torch.float32, "a copy is cast by itself"
    assert getattr(twin, cast)() is twin and twin.dtype == dtype
    for name, weight in packed_weights(model):
        assert weight.dtype == dtype
        assert all(torch.equal(part, parts[name][key]) for key, part in weight.qtensor().parts().items())
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        found = model(ids).logits
        assert found.dtype == dtype and torch.equal(found, other(ids).logits)
    plain = lowbit.dequantize(model)
    assert plain.half().dtype == torch.float16, "a float model casts by its own method again"
