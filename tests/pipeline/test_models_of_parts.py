"""Models whose layers differ in size, or that have several parts which read text, are quantized and load as what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.opening import open_source
from lowbit.pipeline.effort import no_text_for
from lowbit.planning.kv_cache import kv_cache
from tiny import VOCAB, tiny_tokenizer

IDS = torch.randint(3, VOCAB - 8, (2, 24), generator=torch.Generator().manual_seed(0))


def gemma4() -> Any:
    """Every second layer has wider heads, and the last two read the keys and values of those before."""
    config = transformers.Gemma4TextConfig(
        architectures=["Gemma4ForCausalLM"], vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=16,
        vocab_size_per_layer_input=VOCAB, hidden_size_per_layer_input=16, num_kv_shared_layers=2, max_position_embeddings=128,
        layer_types=["sliding_attention", "full_attention"] * 2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma4ForCausalLM(config).eval()


def musicgen() -> Any:
    torch.manual_seed(0)
    text = transformers.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    audio = transformers.EncodecConfig(
        hidden_size=16, num_filters=4, num_residual_layers=1, num_lstm_layers=1, codebook_size=32, codebook_dim=16
    )
    decoder = transformers.MusicgenDecoderConfig(
        vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, num_codebooks=2,
        bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    config = transformers.MusicgenConfig(text_encoder=text, audio_encoder=audio, decoder=decoder)
    config.architectures = ["MusicgenForConditionalGeneration"]
    return transformers.MusicgenForConditionalGeneration(config).eval()


def near(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def test_layers_of_different_sizes(tmp_path: Path) -> None:
    model = gemma4()
    cache = kv_cache(model.config)
    assert cache.full == 2 * 2 * 16 * 2 and cache.windowed == ((16, 2 * 2 * 8 * 2),)  # the last two layers keep none
    model.save_pretrained(tmp_path / "float")
    with torch.no_grad():
        wanted = model(input_ids=IDS).logits
        for recipe, most in (("w8", 0.1), ("w4", 0.5), ("gptq@int4:g16", 0.5)):
            options: dict[str, Any] = {"calibration": list(IDS)} if "gptq" in recipe else {"effort": "none"}
            lowbit.quantize(tmp_path / "float", recipe, tmp_path / recipe[:4], **options)
            loaded = lowbit.load(tmp_path / recipe[:4])
            assert type(loaded) is type(model) and near(wanted, loaded(input_ids=IDS).logits) < most, recipe


def test_several_parts_that_read_text(tmp_path: Path) -> None:
    model = musicgen()
    assert text_config(model.config) is text_config(model.config, decoder=True) is model.config.decoder
    model.save_pretrained(tmp_path / "float")
    made = lowbit.quantize(tmp_path / "float", "w8", tmp_path / "w8", effort="none")
    assert made.report.coverage > 0.3
    loaded: Any = lowbit.load(tmp_path / "w8")
    sound = torch.randn(1, 1, 640, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 64, (4, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for run in (
            lambda m: m(input_ids=IDS, decoder_input_ids=codes).logits,
            lambda m: m.audio_encoder.encoder(sound),
        ):
            assert near(run(model), run(loaded)) < 0.05


def test_a_model_that_also_sees_is_calibrated_unasked(tmp_path: Path) -> None:
    text = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    sight = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=sight, text_config=text, image_token_index=VOCAB - 1)
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    assert no_text_for(open_source(tmp_path / "float")) == ""
    (note,) = lowbit.plan(tmp_path / "float", "w4").notes
    assert note.startswith("calibration text does not come to 8 weights (") and "vision_tower" in note
    made = lowbit.quantize(tmp_path / "float", "w4", tmp_path / "out")
    assert made.report.calibration is not None and made.plan.notes == (note,)
    unread = [layer for layer in made.report.layers if "not used while" in layer.note]
    assert len(unread) == 8 and not any(layer.output for layer in unread)


def test_what_reads_no_text_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    vit = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=16, patch_size=8
    )
    transformers.ViTModel(vit).save_pretrained(tmp_path / "float")
    with pytest.raises(SourceError, match=r"ViTModel reads pixel_values, not text$"):
        lowbit.quantize(tmp_path / "float", "gptq@int4:g16", tmp_path / "out", calibration=list(IDS))
    assert [p.name for p in tmp_path.iterdir()] == ["float"]
