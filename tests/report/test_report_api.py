"""compare from end to end: quantized, written, read back, measured, drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowbit
from lowbit.errors import OutputError
from tiny import save_tiny

TEXT = ["The cat sat on the mat and looked at the moon. " * 60]


def test_compare_measures_and_draws(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    rows = lowbit.compare(
        tmp_path / "model", ["absmax@int8:channel", "w4", "absmax@int8:g32:asym"], text=TEXT, windows=2, length=64,
        plots=tmp_path / "figures",
    )  # fmt: skip
    base, w8, w4, wrong = rows
    assert base.is_base and base.card and base.card.parts.linear_bits == 32.0
    assert w8.card and w4.card and w8.card.quality and w4.card.quality
    assert 0 < w8.card.quality.kl_mean.value < w4.card.quality.kl_mean.value
    assert w8.card.parts.bits > w4.card.parts.bits
    assert wrong.card is None and "cannot fill the offset" in (wrong.error or "")
    for name in ("weights.png", "frontier.png"):
        assert (tmp_path / "figures" / name).read_bytes().startswith(b"\x89PNG")


def test_figures_that_cannot_be_written_are_known_before_the_work(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(OutputError, match="cannot draw into"):
        lowbit.compare(tmp_path / "model", ["w4"], text=TEXT, windows=1, length=64, plots=tmp_path / "figures")


def test_evaluating_does_not_touch_the_users_model() -> None:
    import torch

    from lowbit.measure.speed import SpeedSettings
    from tiny import tiny_model, tiny_tokenizer

    model = tiny_model("llama").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = lowbit.quantize(model, "w4", tokenizer=tiny_tokenizer())
    few = SpeedSettings(prompt=4, new=4, prefill=8, batch=0, repeats=1)
    card = lowbit.evaluate(result, text=TEXT, windows=1, length=64, speed=few)
    assert card.quality and card.quality.kl_mean.value > 0 and card.speed and card.speed.model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
