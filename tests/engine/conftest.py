"""Tiny models of the families that the engine knows, float and quantized, written once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tiny`

from engine_models import save_model

import lowbit
from lowbit.kernels.core import core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a compiler there is no engine to test."""
    if core() is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="lowbit._core is not built"))


@pytest.fixture(scope="session")
def float_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float folder of a family."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp("float") / name
        save_model(name, path)
        return path

    return folder


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory, float_folder: Callable[[str], Path]) -> Callable[..., Path]:
    """The folder that quantizing a family by a recipe gives. Do not write to it."""

    @cache
    def folder(name: str, recipe: str, calibration: tuple[str, ...] = ()) -> Path:
        out = tmp_path_factory.mktemp("packed") / name
        options = {"calibration": list(calibration)} if calibration else {}
        lowbit.quantize(float_folder(name), recipe, out, **options)
        return out

    return folder
