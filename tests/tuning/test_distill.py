"""Distillation end to end on tiny models: nearer to the float model, guarded, resumable, the same every time."""

from __future__ import annotations

import filecmp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lowbit
from lowbit.blockwise import model_tuner as tuned
from lowbit.errors import RecipeError
from lowbit.interchange.files import atomic, folder_writer
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.recipes.recipe import Recipe
from lowbit.tuning.distill import split
from lowbit.tuning.divergence import divergence
from tiers import mostly_nightly
from tiny import VOCAB, save_tiny, tiny_model

PLAIN, TUNED = "int3:g16,embed=int4:g16", "distill(steps=40,rate=0.01)@int3:g16,embed=int4:g16"


def token_ids(count: int = 20, length: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator) for _ in range(count)]


@torch.no_grad()
def between(model: nn.Module, other: nn.Module) -> float:
    """KL(model || other) on text that nothing was tuned on."""
    ids = torch.stack(token_ids(16, seed=99))
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    a, b = (m(input_ids=ids, **extra).logits.flatten(0, 1) for m in (model, other))
    return float(divergence(b, a))


NAMES = ["llama", "llama-tied", "gpt2", "gemma3", "opt", "mixtral", "t5", "qwen3-moe"]


@pytest.mark.parametrize("name", mostly_nightly(NAMES, every=lambda n: n in (1, 2, 5, 6)))
def test_the_divergence_falls_on_text_that_was_not_seen(name: str) -> None:
    model = tiny_model(name)
    plain = lowbit.quantize(model, PLAIN, calibration=token_ids(60), length=32)
    made = lowbit.quantize(model, TUNED, calibration=token_ids(60), length=32)
    before, after = between(model, plain.model), between(model, made.model)
    assert after < 0.9 * before, (before, after)
    assert made.report.tuning is not None and made.report.tuning["step"] > 0
    held = made.report.tuning["divergence"]
    assert held[1] < 0.9 * held[0]
    old, new = plain.model.state_dict(), made.model.state_dict()
    assert list(old) == list(new)
    for key in old:
        if key.endswith("codes"):
            assert torch.equal(old[key], new[key]), key
    assert any(not torch.equal(old[k], new[k]) for k in old if k.endswith("scale"))
    assert any(not torch.equal(old[k], new[k]) for k in old if "norm" in k or "ln_" in k)


def test_quantized_inputs_are_seen_while_tuning() -> None:
    """What is measured while tuning is what the packed model does, rounding of its inputs included."""
    model, text = tiny_model("llama"), token_ids(60)
    float_inputs = lowbit.quantize(model, PLAIN, calibration=text, length=32)
    plain = lowbit.quantize(model, f"{PLAIN},a=int2:token", calibration=text, length=32)
    made = lowbit.quantize(model, f"{TUNED},a=int2:token", calibration=text, length=32)
    held = made.report.tuning and made.report.tuning["divergence"]
    assert between(model, plain.model) > 1.2 * between(model, float_inputs.model)
    assert held and held[0] == pytest.approx(between(model, plain.model), rel=0.1)
    assert between(model, made.model) < 0.95 * between(model, plain.model)


def test_the_model_that_was_given_does_not_change() -> None:
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lowbit.quantize(model, TUNED, calibration=token_ids(), length=32)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_where_nothing_is_better_nothing_changes() -> None:
    """A rate that breaks everything: the result is byte for byte what it was without the tuner."""
    model = tiny_model("llama")
    plain = lowbit.quantize(model, PLAIN, calibration=token_ids(), length=32).model.state_dict()
    made = lowbit.quantize(
        model, "distill(steps=8,rate=1000.0)@int3:g16,embed=int4:g16", calibration=token_ids(), length=32
    )
    assert made.report.tuning is not None and made.report.tuning["step"] == 0
    assert made.report.tuning["divergence"][0] == made.report.tuning["divergence"][1]
    new = made.model.state_dict()
    assert all(torch.equal(v, new[k]) for k, v in plain.items())


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("distill") / "float"
    save_tiny("llama-tied", path)
    return path


SHORT = "gptq+distill(steps=6,rate=0.01)@int3:g16,embed=int4:g16"


def make(model: Path, out: Path) -> lowbit.Quantized:
    return lowbit.quantize(model, SHORT, out, calibration=token_ids(), length=32, max_shard_bytes=9000)


@pytest.fixture(scope="module")
def whole(float_folder: Path) -> Path:
    """The result of a run that nothing interrupted."""
    return Path(make(float_folder, float_folder.with_name("whole")).folder or "")


def same_bytes(a: Path, b: Path) -> bool:
    names = sorted(p.name for p in a.iterdir())
    return names == sorted(p.name for p in b.iterdir()) and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in names
    )


class Killed(BaseException):
    """Stands for a kill: nothing in the code catches it."""


# Where a run ends: (object, name of the function, the call that does not return).
KILLS: list[tuple[object, str, int]] = [
    (tuned, "tune", 0), (tuned, "save_file", 0), (atomic, "sync", 2), (atomic, "sync", 3),
    (FolderWriter, "rewrite", 0), (FolderWriter, "rewrite", 1), (FolderWriter, "rewrite", 7), (FolderWriter, "_put", 30),
    (folder_writer, "sync", 3), (FolderWriter, "verify", 0), (FolderWriter, "finish", 0),
]  # fmt: skip


@pytest.mark.parametrize(("kill", "after"), mostly_nightly(KILLS, [False, True], every=lambda k, a: (k + a) % 2 == 0))
def test_a_killed_run_goes_on_to_the_same_bytes(
    kill: tuple[object, str, int], after: bool, float_folder: Path, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    place, name, at = kill
    old: Callable[..., object] = getattr(place, name)
    calls = 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at + 1 and not after:
            raise Killed
        result = old(*args, **kwargs)
        if calls == at + 1:
            raise Killed
        return result

    out = tmp_path / "out"
    monkeypatch.setattr(folder_writer, "_FLUSH", 2000)  # so that some entries are on the disk and some are not
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(place, name, dying)
        make(float_folder, out)
    assert not out.exists() or (name == "finish" and after)
    if not out.exists():
        make(float_folder, out)
    assert same_bytes(whole, out)


def test_files_and_memory_agree(float_folder: Path, whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(float_folder).eval()
    made = lowbit.quantize(model, SHORT, calibration=token_ids(), length=32)
    saved = made.save(tmp_path / "saved")
    found, wanted = {}, {}
    for folder, into in ((saved, found), (whole, wanted)):
        for file in folder.glob("*.safetensors"):
            into |= load_file(file)
    assert set(found) == set(wanted)
    assert all(torch.equal(found[k], wanted[k]) for k in wanted)


def test_held_out_windows_are_not_trained_on() -> None:
    windows = tuple(torch.arange(600) + 1000 * i for i in range(25))
    held, pieces = split(windows)
    assert [int(w[0]) // 1000 for w in held] == [9, 19]
    assert {int(p[0]) // 1000 for p in pieces} == set(range(25)) - {9, 19} and {len(p) for p in pieces} == {512, 88}
    held, pieces = split(windows[:2])
    assert len(held) == 1 and {int(p[0]) // 1000 for p in pieces} == {0}
    assert len(split(windows * 8)[0]) == 8


@pytest.mark.parametrize("text", [TUNED, SHORT, "gptq+distill@int4:g32", "awq+search+gptq+distill@int4:g32"])
def test_recipes_print_what_they_were_read_from(text: str) -> None:
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe and recipe.tuner is not None and recipe.needs_calibration


@pytest.mark.parametrize(
    "text, words",
    [
        ("distill+gptq@int4:g32", "comes last"),
        ("gptq+distill+distill@int4:g32", "one tuner"),
        ("gptq+distill(stepz=3)@int4:g32", "stepz"),
        ("gptq+distil@int4:g32", "distill"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(text)


def test_one_window_is_too_few() -> None:
    with pytest.raises(RecipeError, match="samples=2"):
        lowbit.quantize(tiny_model("llama"), TUNED, calibration=token_ids(1), length=32)
    with pytest.raises(RecipeError, match="temperature"):
        lowbit.quantize(tiny_model("llama"), "distill(temperature=0.0)@int4:g16", calibration=token_ids(), length=32)


def test_the_plan_counts_the_whole_float_model(float_folder: Path) -> None:
    without = lowbit.plan(float_folder, "gptq@int4:g16")
    tuned_plan = lowbit.plan(float_folder, "gptq+distill@int4:g16")
    assert tuned_plan.peak_bytes > 4 * tuned_plan.parameters and tuned_plan.peak_bytes >= without.peak_bytes
    assert tuned_plan.output_bytes == without.output_bytes
