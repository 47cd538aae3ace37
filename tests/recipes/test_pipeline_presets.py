"""Every preset through quantize, save, `from_pretrained` and evaluate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers

import lowbit
from lowbit.nn.swap import packed_weights
from lowbit.recipes.presets import PRESETS
from lowbit.recipes.recipe import Recipe
from tiny import TINY, tiny_tokenizer

TEXT = ["the man in the rain and another thing in the train ran on and on " * 12]
# More bits, less loss; a bound for each preset that a broken format, scale or code would break.
WORST = {"w2": 0.6, "w3": 0.35, "mxfp4": 0.3, "nvfp4": 0.25}


def models(width: int) -> transformers.PreTrainedModel:
    """A tiny Llama of this hidden size whose logits mean something: peaked, so that KL sees an error."""
    config = TINY["llama-tied"]()
    config.hidden_size, config.head_dim, config.intermediate_size = width, 8, 2 * width + 6
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(torch.ones_like(param) if "norm" in name else torch.randn_like(param) * 0.2)
    return model.eval()


@pytest.fixture(scope="module", params=[32, 36])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model whose groups come out even (32), and one where every group size leaves a rest (36)."""
    path = tmp_path_factory.mktemp("float") / "model"
    models(request.param).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset(preset: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lowbit.quantize(folder, preset, out, **({} if Recipe.of(preset).needs_calibration else {"effort": "none"}))
    files = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    assert result.plan.output_bytes == files == result.report.bytes_after + len(result.plan.shards[0].header)

    card = lowbit.evaluate(out, against=folder, text=TEXT, windows=4, length=32)
    assert card.quality is not None and card.quality.kl_mean is not None and card.quality.ratio is not None
    assert math.isfinite(card.quality.kl_mean.value) and math.isfinite(card.quality.ratio.value)
    assert 0 <= card.quality.kl_mean.value < 2
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    source = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    recipe = Recipe.of(preset)
    if recipe.transforms:  # the weights are others than the source's, and so is what they are compared with
        assert card.quality.kl_mean.value < 0.1
        return
    errors = {layer.name: layer.error for layer in result.report.layers}
    for name, weight in packed_weights(model):
        x = source.get_parameter(name).detach()
        error = float((weight.dequantize() - x).norm() / x.norm())
        assert error == pytest.approx(errors[name], rel=1e-3, abs=1e-6)
        bits = recipe.format_for(name, "embedding" if "embed" in name else "linear").grid.bits
        assert error < WORST.get(preset, 0.03 if bits == 8 else 0.2), name
    title = f"{preset} = {recipe}"
    assert result.plan.recipe.title == title and card.parts.recipe == title


def test_more_bits_cost_less_quality(tmp_path: Path) -> None:
    models(32).save_pretrained(tmp_path / "float")
    tiny_tokenizer().save_pretrained(tmp_path / "float")
    kl = []
    for preset in ("w8", "w4", "w3", "w2"):
        card = lowbit.evaluate(lowbit.quantize(tmp_path / "float", preset), text=TEXT, windows=4, length=32)
        kl.append(card.quality.kl_mean.value)
    assert kl == sorted(kl) and kl[0] < 0.01 < kl[-1]
