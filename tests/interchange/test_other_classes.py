"""A folder loads as every class that its float original loads as, with the same values in the same places."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import lowbit
from lowbit.errors import SourceError
from lowbit.kernels.dispatch import Dispatcher
from lowbit.nn.packed import PackedWeight
from lowbit.nn.swap import packed_weights
from tiny import TINY, VOCAB, tiny_model

RECIPE = "int4:g32"
TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0}  # fmt: skip
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _bart(cls: Any, **more: Any) -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    return cls(transformers.BartConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, **sizes, **more))


def _clip() -> nn.Module:
    text = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=VISION | {"projection_dim": 32}, projection_dim=32)
    )


def _qwen3_5() -> nn.Module:
    text = TEXT | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                   "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
    seen = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 8,
            "temporal_patch_size": 2, "num_position_embeddings": 16}  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=seen, image_token_id=120, video_token_id=121,
        vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen3_5ForConditionalGeneration(config)


def _gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=120
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}
    }
    seen = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config=seen, image_token_id=120, video_token_id=121,
        vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    return transformers.Qwen2VLForConditionalGeneration(config)


def _bigbird_pegasus() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "attention_type": "original_full",
             "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    config = transformers.BigBirdPegasusConfig(vocab_size=VOCAB, d_model=32, max_position_embeddings=64, **sizes)
    return transformers.BigBirdPegasusForConditionalGeneration(config)


# Models that tiny.py does not have.
MADE: dict[str, Callable[[], nn.Module]] = {
    "bart": lambda: _bart(transformers.BartForConditionalGeneration),
    "bart-base": lambda: _bart(transformers.BartModel),
    "bert-base": lambda: transformers.BertModel(TINY["bert"]()),
    "qwen3-base": lambda: transformers.Qwen3Model(TINY["qwen3"]()),
    "xlm-roberta": lambda: transformers.XLMRobertaForMaskedLM(
        transformers.XLMRobertaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=80
        )
    ),
    "clip": _clip,
    "qwen3-5": _qwen3_5,
    "gemma3-images": _gemma3,
    "qwen2-vl": _qwen2_vl,
    "bigbird-pegasus": _bigbird_pegasus,
}  # fmt: skip

# What was quantized, and the class that it is loaded as.
PAIRS = [
    *((name, "AutoModel") for name in TINY),
    *((name, "AutoModel") for name in ("bart", "xlm-roberta", "qwen3-5", "gemma3-images")),
    ("llama", "AutoModelForSequenceClassification"), ("qwen3", "AutoModelForSequenceClassification"),
    ("gpt2", "AutoModelForTokenClassification"), ("bert", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForQuestionAnswering"), ("bert-base", "AutoModelForMaskedLM"), ("bert", "BertLMHeadModel"),
    ("qwen3-base", "AutoModelForCausalLM"), ("qwen3-base", "Qwen3ForSequenceClassification"),
    ("t5", "T5EncoderModel"), ("t5", "T5ForSequenceClassification"), ("bart", "BartForCausalLM"), ("bart-base", "BartForConditionalGeneration"),
    ("xlm-roberta", "XLMRobertaForSequenceClassification"), ("xlm-roberta", "XLMRobertaForCausalLM"),
    ("qwen3-5", "AutoModelForCausalLM"), ("qwen3-5", "Qwen3_5TextModel"), ("qwen2-vl", "AutoModel"), ("qwen2-vl", "Qwen2VLTextModel"), ("gemma3-images", "AutoModelForCausalLM"),
    ("gemma3-images", "Gemma3ForSequenceClassification"), ("clip", "CLIPTextModel"), ("clip", "CLIPVisionModelWithProjection"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Of a model by name: its packed folder, and a float folder of what the packed weights stand for. Made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def both(name: str) -> tuple[Path, Path]:
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            model(name).save_pretrained(root / "float")
            lowbit.quantize(root / "float", RECIPE, root / "packed")
            lowbit.dequantize_model(root / "packed", root / "dense", dtype="float32")
            made[name] = root / "packed", root / "dense"
        return made[name]

    return both


def model(name: str) -> Any:
    if name in TINY:
        return tiny_model(name)
    torch.manual_seed(0)
    made = MADE[name]()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    return made.eval()


def outputs(model: Any) -> Tensor:
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids}
    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    elif model.config.is_encoder_decoder and "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids
    ids[:, -1] = 2  # the end, which BART's and T5's classifiers look for
    with torch.no_grad():
        return model(**inputs)[0].float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def tensor_of(model: nn.Module, name: str) -> Tensor:
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=lambda value: value)
def test_it_loads_as_what_its_float_original_loads_as(name: str, kind: str, folders: Any) -> None:
    packed, dense = folders(name)
    cls = getattr(transformers, kind)
    found, info = cls.from_pretrained(packed, dtype=torch.float32, output_loading_info=True)
    truth, told = cls.from_pretrained(dense, dtype=torch.float32, output_loading_info=True)
    assert type(found) is type(truth)
    assert set(info["missing_keys"]) <= set(told["missing_keys"]) and not info["mismatched_keys"]
    for key in told["missing_keys"]:  # new heads are random
        with torch.no_grad():
            tensor_of(truth, key).copy_(getattr(w := tensor_of(found, key), "dequantize", lambda w=w: w)())
    weights = dict(packed_weights(found))
    assert weights
    for key, weight in weights.items():
        assert torch.equal(weight.dequantize(), truth.get_parameter(key)), key
        weight.dispatcher = Dispatcher("expand")
    state, floats = truth.state_dict(), found.state_dict()
    for key in state.keys() & floats.keys():
        assert torch.equal(state[key], floats[key]), key
    mine = {key for key, _ in packed_weights_by_every_name(found)}
    assert state.keys() == {key for key in floats if not key.startswith(tuple(f"{key}." for key in mine))} | mine
    assert distance(outputs(found), outputs(truth)) < 1e-5


def packed_weights_by_every_name(model: nn.Module) -> list[tuple[str, PackedWeight]]:
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, PackedWeight)]


@pytest.mark.parametrize(("name", "kind"), [("qwen3", "AutoModel"), ("bert-base", "AutoModelForMaskedLM"),
                                            ("t5", "T5EncoderModel"), ("bart", "BartForCausalLM"), ("bigbird-pegasus", "BigBirdPegasusForCausalLM"),
                                            ("qwen2-vl", "Qwen2VLTextModel"), ("qwen3-5", "AutoModelForCausalLM")])  # fmt: skip
def test_what_another_class_saves_is_a_folder_of_that_class(name: str, kind: str, folders: Any, tmp_path: Path) -> None:
    cls = getattr(transformers, kind)
    found = cls.from_pretrained(folders(name)[0], dtype=torch.float32)
    found.save_pretrained(tmp_path / "again")
    again, info = type(found).from_pretrained(tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert dict(packed_weights(again)).keys() == dict(packed_weights(found)).keys()
    assert torch.equal(outputs(again), outputs(found))
    whole = lowbit.load(tmp_path / "again", dtype=torch.float32)
    assert type(whole) is type(found) and torch.equal(outputs(whole), outputs(found))
    plain = lowbit.dequantize(found)
    assert not list(packed_weights(plain)) and distance(outputs(plain), outputs(again)) < 2e-4
    plain.save_pretrained(tmp_path / "float")
    assert distance(outputs(type(found).from_pretrained(tmp_path / "float")), outputs(again)) < 2e-4


def test_a_head_that_the_folder_has_not_is_random_and_transformers_says_so(
    folders: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level(logging.WARNING), caplog.at_level(logging.WARNING, logger="transformers"):
        found = transformers.AutoModelForSequenceClassification.from_pretrained(folders("llama")[0], num_labels=3)
    assert "score.weight" in caplog.text and "MISSING" in caplog.text
    assert found.score.weight.shape == (3, 32) and found.score.weight.abs().sum() > 0


def test_a_class_that_has_none_of_its_weights_is_refused(folders: Any) -> None:
    with pytest.raises(
        SourceError, match="GPT2Model has none of the weights of this folder.*load it as LlamaForCausalLM or"
    ):
        transformers.GPT2Model.from_pretrained(folders("llama")[0])


def test_a_class_whose_part_is_all_float_loads(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "int8:channel,bert.*=keep", tmp_path / "head")
    found, info = transformers.AutoModel.from_pretrained(
        tmp_path / "head", dtype=torch.float32, output_loading_info=True
    )
    truth = transformers.AutoModel.from_pretrained(tmp_path / "float")
    assert not list(packed_weights(found))
    assert all(
        torch.equal(t, truth.state_dict()[k]) for k, t in found.state_dict().items() if k not in info["missing_keys"]
    )


def test_it_is_spread_over_devices(folders: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    whole = transformers.AutoModel.from_pretrained(folders("llama")[0], dtype=torch.float32)
    places = {"embed_tokens": "cpu", "layers.0": "disk", "layers.1": "cpu", "norm": "cpu", "rotary_emb": "cpu"}
    spread = transformers.AutoModel.from_pretrained(
        folders("llama")[0], dtype=torch.float32, device_map=places, offload_folder=tmp_path
    )
    assert spread.device == torch.device("cpu") and torch.equal(outputs(spread), outputs(whole))
