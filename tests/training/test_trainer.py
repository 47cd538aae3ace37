"""transformers' Trainer trains, saves and resumes prepared models as any other."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import SourceError
from tiny import tiny_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate")
RECIPE = "int4:g32,a=int8:token"


class Ids(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trained(model: Any, folder: Path, resume: Path | None = None, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, save_steps=2, report_to=[],
        disable_tqdm=True, use_cpu=True, seed=1, weight_decay=0.01, **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Ids()).train(resume_from_checkpoint=None if resume is None else str(resume))
    return model


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return set(left) == set(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("trainer")
    return trained(lowbit.prepare_qat(tiny_model("llama-tied"), RECIPE), folder), folder


def test_a_run_that_is_resumed_ends_with_the_same_bits(run: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = run
    assert not same(model, lowbit.prepare_qat(tiny_model("llama-tied"), RECIPE))
    again = trained(lowbit.prepare_qat(tiny_model("llama-tied"), RECIPE), tmp_path, folder / "checkpoint-2")
    assert same(model, again)


def test_gradient_checkpointing_changes_nothing(run: tuple[Any, Path], tmp_path: Path) -> None:
    model = lowbit.prepare_qat(tiny_model("llama-tied"), RECIPE)
    model.gradient_checkpointing_enable()
    assert same(run[0], trained(model, tmp_path))


def test_a_checkpoint_is_prepared_with_its_scales_and_converted(run: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = run
    again = lowbit.prepare_qat(folder / "checkpoint-4", RECIPE)
    assert same(model, again)
    ids = torch.randint(3, 128, (1, 9))
    lowbit.convert(again, tmp_path / "out")
    with torch.no_grad():
        found = lowbit.load(tmp_path / "out", kernel="expand")(input_ids=ids).logits
        assert torch.equal(found, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("recipe", ["int4:g16", "rotate@int4:g32"])
def test_a_checkpoint_of_another_recipe_is_refused(recipe: str, run: tuple[Any, Path]) -> None:
    with pytest.raises(SourceError, match="is a checkpoint of training"):
        lowbit.prepare_qat(run[1] / "checkpoint-4", recipe)
