"""doctor: what it says agrees with the kernels themselves."""

from __future__ import annotations

import json

import pytest
import torch

from lowbit.kernels.dispatch import survey
from lowbit.recipes.recipe import Recipe
from lowbit.report import doctor


@pytest.fixture(scope="module")
def report() -> doctor.Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "SIDE", 128)
        return doctor.examine()


def test_every_kernel_is_timed_or_says_why_not(report: doctor.Report) -> None:
    for recipe in doctor._RECIPES:
        fmt = Recipe.parse(recipe).format
        weight = torch.randn(128, 128, generator=torch.Generator().manual_seed(0))
        q = Recipe.parse(recipe).solver_for(fmt)(weight, fmt, Recipe.parse(recipe).fit_for(fmt))
        for kernel, reason in survey(q, torch.float32, torch.device("cpu"), Recipe.parse(recipe).inputs):
            (trial,) = [t for t in report.kernels if (t.recipe, t.dtype, t.kernel) == (recipe, "float32", kernel.name)]
            assert trial.declines == reason
            assert (len(trial.microseconds) == 0) == (reason is not None)


def test_one_kernel_is_chosen_for_each_number_of_rows_and_it_is_the_fastest(report: doctor.Report) -> None:
    for recipe in doctor._RECIPES:
        for i, rows in enumerate(doctor.ROWS):
            able = [t for t in report.kernels if t.recipe == recipe and t.dtype == "bfloat16" and t.microseconds]
            chosen = [t for t in able if rows in t.chosen_for]
            assert len(chosen) == 1
            assert chosen[0].microseconds[i] == min(t.microseconds[i] for t in able)


def test_the_report_is_json_and_names_what_is_missing(report: doctor.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["versions"]["torch"] == torch.__version__ or data["versions"]["torch"] in torch.__version__
    assert data["threads"] == torch.get_num_threads()
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_package_at_all", "nothing")
    assert doctor.examine(kernels=False).optional["no_such_package_at_all"] is False
