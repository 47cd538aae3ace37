"""Cards of models that predict no tokens: how far their outputs moved, and how they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from measure_models import perturbed, tiny_bert, tiny_llama, tiny_t5
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import SourceError, TextError
from lowbit.interchange.hf.heads import predicts_tokens
from lowbit.measure.card import Card
from lowbit.measure.outputs import measure_outputs
from lowbit.report.panel import card_lines
from tiny import tiny_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def built(name: str) -> Any:
    torch.manual_seed(0)
    t: Any = transformers
    if name == "bert":
        return t.BertModel(t.BertConfig(vocab_size=128, max_position_embeddings=64, **SMALL)).eval()
    if name == "vit":
        return t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()
    if name == "wav2vec2":
        config = t.Wav2Vec2Config(
            vocab_size=40, conv_dim=(32,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, **SMALL
        )
        return t.Wav2Vec2ForCTC(config).eval()
    if name == "whisper":
        config = t.WhisperConfig(
            vocab_size=40, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=20, max_target_positions=30, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        )  # fmt: skip
        return t.WhisperForConditionalGeneration(config).eval()
    if name == "clip":
        parts = {"image_size": 32, "patch_size": 8, **SMALL}
        text = {"vocab_size": 90, "max_position_embeddings": 24, "eos_token_id": 2, **SMALL}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=parts, projection_dim=32)).eval()
    return t.LlamaForSequenceClassification(tiny_llama(num_labels=3, pad_token_id=0).config).eval()


@pytest.mark.parametrize("name", ["bert", "vit", "wav2vec2", "whisper", "clip", "classes"])
def test_outputs_beside_the_float_models(name: str) -> None:
    base = built(name)
    assert not predicts_tokens(base)
    same = measure_outputs(base, base, None)
    assert same.error.value == 0 and (same.cosine is None) == (name != "bert")
    moved = measure_outputs(perturbed(base, 0.05), base, None)
    assert 1e-3 < moved.error.value < 1 and moved.error.stderr is not None


def test_the_error_is_that_of_the_hidden_states() -> None:
    base, windows = built("bert"), lowbit.measure.windows.Windows(torch.arange(3, 63).view(2, 30), "t", "", 60)
    other = perturbed(base, 0.1)
    found = measure_outputs(other, base, windows)
    errors, cosines = [], []
    for ids in windows.ids:
        with torch.no_grad():
            a, b = (m(ids[None]).last_hidden_state[0].double() for m in (other, base))
        errors.append(float((a - b).norm() / b.norm()))
        cosines.append(float(torch.dot(a.mean(0), b.mean(0)) / a.mean(0).norm() / b.mean(0).norm()))
    assert found.error.value == pytest.approx(sum(errors) / 2, rel=1e-6)
    assert found.cosine is not None and found.cosine.value == pytest.approx(sum(cosines) / 2, rel=1e-9)
    assert (found.name, found.inputs) == ("last_hidden_state", "2 windows of 30 tokens")


def test_what_predicts_tokens_is_scored_as_ever() -> None:
    assert all(predicts_tokens(m) for m in (tiny_llama(), tiny_t5(), tiny_bert(), torch.nn.Linear(2, 2)))


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_the_card_and_the_hint_of_what_writes_no_text(name: str, tmp_path: Path) -> None:
    built(name).save_pretrained(tmp_path / "f")
    if name == "bert":
        tiny_tokenizer().save_pretrained(tmp_path / "f")
    asked = ["quantize", str(tmp_path / "f"), "w4", "-o", str(tmp_path / "q"), "--windows", "1"]
    found = CliRunner().invoke(app, asked)
    assert found.exit_code == 0, found.output
    assert "outputs moved by" in found.stdout and "not measured" not in found.output
    assert "lowbit generate" not in found.stdout and "import lowbit; model = lowbit.load(" in found.stdout


def test_no_float_model_no_figure() -> None:
    with pytest.raises(SourceError, match="a BertModel predicts no tokens, so it has no perplexity; name its float"):
        lowbit.evaluate(built("bert"), tokenizer=tiny_tokenizer())
    with pytest.raises(TextError, match="reads none"):
        lowbit.evaluate(built("vit"), built("vit"), ["a text"])


def test_a_model_whose_input_is_not_known_says_so() -> None:
    class Odd(transformers.PreTrainedModel):
        config_class, main_input_name = transformers.PretrainedConfig, "graph"

        def __init__(self) -> None:
            super().__init__(transformers.PretrainedConfig())
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, graph: torch.Tensor) -> torch.Tensor:
            return self.layer(graph)

    model: Any = Odd().eval()
    card = lowbit.evaluate(model, model)
    assert dict(card_lines(card))["quality"] == "not measured: no input is known for Odd, which takes 'graph'"
    assert Card.from_json(card.to_json()) == card
