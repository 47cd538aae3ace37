"""Tiny models as folders, quantized once for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tiny`

import lowbit
from tiny import save_tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The float folder of a tiny architecture, written once."""

    @cache
    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(f"float-{name}") / "model"
        save_tiny(name, path)
        return path

    return folder


@pytest.fixture(scope="session")
def packed_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[[str], Path]
) -> Callable[[str, str], Path]:
    """The folder that quantizing a tiny architecture by a recipe gives, made once. Do not write to it."""

    @cache
    def folder(name: str, recipe: str) -> Path:
        out = tmp_path_factory.mktemp(f"packed-{name}") / "out"
        lowbit.quantize(tiny_folder(name), recipe, out)
        return out

    return folder
