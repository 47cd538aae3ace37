"""What stands around the package: the mark of its types, and workflows that agree with pyproject.toml."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_type_checkers_may_trust_the_annotations() -> None:
    assert (files("lowbit") / "py.typed").is_file()


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def versions(project: dict[str, Any]) -> list[str]:
    """The versions of Python that the classifiers promise."""
    lead = "Programming Language :: Python :: "
    return [line.removeprefix(lead) for line in project["project"]["classifiers"] if line.startswith(lead)]


def test_the_suite_runs_on_every_python_that_is_promised(versions: list[str]) -> None:
    matrix = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text("utf-8"))["jobs"]["suite"]["strategy"][
        "matrix"
    ]
    assert matrix["python"] == versions
    assert {extra["python"] for extra in matrix["include"]} == {versions[-1]}


def test_wheels_are_made_or_tried_for_every_python_that_is_promised(
    project: dict[str, Any], versions: list[str]
) -> None:
    assert project["tool"]["cibuildwheel"]["build"] == [f"cp{version.replace('.', '')}-*" for version in versions]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_do_no_more_than_it_must(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == ({"publish": {"id-token": "write"}} if path.stem == "wheels" else {})
    if granted:
        assert "refs/tags/" in workflow["jobs"]["publish"]["if"]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert all("@" in step["uses"] for step in steps if "uses" in step)
    assert all(step["with"]["persist-credentials"] is False for step in steps if "checkout" in step.get("uses", ""))


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_is_one_that_github_takes(name: str) -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text("utf-8"))
    assert form["name"] and form["description"]
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert fields and all(part["attributes"]["label"] for part in fields)
    assert len({part["id"] for part in fields}) == len(fields)
    if name == "bug":
        (doctor,) = [part for part in fields if "lowbit doctor" in part["attributes"]["description"]]
        assert doctor["validations"]["required"]
