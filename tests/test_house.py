"""What stands around the package: the mark of its types, and workflows that agree with pyproject.toml."""

from __future__ import annotations

from importlib.resources import files


def test_type_checkers_may_trust_the_annotations() -> None:
    assert (files("lowbit") / "py.typed").is_file()
