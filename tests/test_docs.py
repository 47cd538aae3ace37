"""The pages tell the truth where a test can tell: links resolve, files and names that they mention exist, commands have their options."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

import lowbit
from lowbit.cli.main import app
from lowbit.recipes.presets import PRESETS
from lowbit.solvers.registry import methods
from test_public import ROOMS
from tiny import TINY, save_tiny

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "lowbit"
FOLDERS = (
    ".github",
    "benchmarks",
    "csrc",
    "docs",
    "examples",
    "src",
    "tests",
)  # a checkout has others, that nobody wrote for it
PAGES = [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in sorted((ROOT / folder).rglob("*.md")))]
# What these say of the code is of the day on which they were written.
PAST = (ROOT / "CHANGELOG.md", *(ROOT / "benchmarks" / "results").iterdir())
PRESENT = [page for page in PAGES if page not in PAST]
CODE = (".py", ".pyi", ".h", ".cpp", ".inl", ".def", ".cmake")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text("utf-8"))


def blocks(page: Path, *kinds: str) -> Iterator[str]:
    """The blocks of code of these kinds; "" is one that says none."""
    for kind, text in FENCE.findall(page.read_text("utf-8")):
        if kind in kinds:
            yield text


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    wrong = []
    for link in re.findall(r"\]\(\s*([^)\s]+)\s*\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def is_there(mention: str, page: Path) -> bool:
    """Whether a path that a page mentions exists: from the root, from the package, or from where the page is; in a README of a
    folder, anywhere below it."""
    pattern = mention.rstrip("/")
    if any(next(base.glob(pattern), None) for base in (ROOT, SRC, page.parent)):
        return True
    return page.name == "README.md" and page.parent != ROOT and any(page.parent.rglob(pattern))


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_files_that_are_mentioned_exist(page: Path) -> None:
    wrong = []
    for mention in re.findall(r"`([\w./*-]+)`", prose(page)):
        folder = mention.split("/")[0]
        ours = "/" in mention and folder in {*ROOMS, *FOLDERS}
        named = mention.endswith(CODE) and not mention.startswith((".", "llama.cpp"))  # an ending alone is no file
        if (
            (ours or named)
            and not re.search(r"[A-Z]{2}", mention.replace("README", ""))
            and not is_there(mention, page)
        ):
            wrong.append(mention)
    assert not wrong


def knows(name: str) -> bool:
    """Whether `name` is a module below the package, or something that one has."""
    parts = name.split(".")[1:]
    if parts[0] in dir(lowbit):
        return True
    place = SRC
    while parts and (place / parts[0]).is_dir():
        place /= parts.pop(0)
    if not parts:
        return place != SRC
    file = place / f"{parts.pop(0)}.py"
    return file.is_file() and all(re.search(rf"\b{part}\b", file.read_text("utf-8")) for part in parts)


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_names_of_the_package_that_are_mentioned_exist(page: Path) -> None:
    names = re.findall(r"`(lowbit(?:\.\w+)+)", prose(page))
    assert not [
        name
        for name in names
        if not name.endswith((".json", ".py", "._core")) and "._core." not in name and not knows(name)
    ]


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_python_that_is_shown_is_python_and_uses_names_that_there_are(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lowbit":
                assert node.attr in dir(lowbit)


def run_page(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str) -> None:
    """The code of a page from top to bottom, on a tiny model that the engine takes, with a chat template, in the folder `model`."""

    def wide(make: Callable[[], Any] = TINY["llama"]) -> Any:
        config = make()
        config.hidden_size, config.head_dim, config.max_position_embeddings = 64, 16, 1024
        return config

    monkeypatch.setitem(TINY, "llama", wide)
    save_tiny("llama", tmp_path / model)
    (tmp_path / model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    words = "The cat sat on the mat and looked at the moon. " * 400
    (tmp_path / "my-text.txt").write_text(words)
    monkeypatch.chdir(tmp_path)
    known: dict[str, object] = {}
    for number, block in enumerate(blocks(ROOT / "docs" / page, "python")):
        for name, tiny in TINY_VALUES.items():
            block = block.replace(name, tiny)
        exec(compile(block, f"docs/{page}, block {number + 1}", "exec"), known)


def test_the_page_on_python_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("python.md", monkeypatch, tmp_path, "smollm2")


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="Trainer needs accelerate")
def test_the_page_on_training_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_page("training.md", monkeypatch, tmp_path, "my-model")


# What a tiny model can take, in place of what people give: windows of 64 tokens, and little text.
TINY_VALUES = {
    'calibration="my-text.txt"': 'calibration="my-text.txt", samples=4, length=128',
    "windows=4)": 'windows=1, length=64, text="my-text.txt")',
    "windows=2)": 'windows=1, length=64, text="my-text.txt")',
    "target_bits=4.25": "target_bits=5",
    "range(20)": "range(2)",
}


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_commands_that_are_shown_have_their_options(page: Path) -> None:
    shown = [line for block in blocks(page, "", "bash", "sh") for line in block.splitlines()]
    shown += re.findall(r"`(lowbit [^`]+)`", prose(page))
    for line in shown:
        words = shlex.split(line, comments=True) if line.startswith("lowbit ") else []
        if len(words) < 2 or not words[1].islower():
            continue
        assert words[1] in COMMANDS, line
        options = {
            option for parameter in COMMANDS[words[1]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in words[2:] if re.match(r"-{1,2}[a-z]", word)}
        assert given <= {*options, "--help"}, line


def test_the_page_on_recipes_has_every_preset_and_method() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    shown = dict(re.findall(r"^\| `([\w-]+)` \| `([^`]+)` \|", page, re.MULTILINE))
    assert shown == {name: re.sub(r",embed=.*", "", preset.text) for name, preset in PRESETS.items()}
    rows = re.findall(r"^\| `([\w-]+)` \| `[^`]+` \| (.+) \| (.+) \| (.+) \|$", page.replace(r"\|", "!"), re.MULTILINE)
    said = {name: (p.about.replace("|", "!"), p.when, p.source) for name, p in PRESETS.items()}
    assert {name: tuple(texts) for name, *texts in rows} == said
    missing = [name for name in methods() if f"`{name}`" not in page]
    assert not missing, f"docs/recipes.md names no {', '.join(missing)}: add it to the steps of a composition"


def test_the_front_page_is_read_to_the_end() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 8192


@pytest.mark.parametrize("folder", [*(f"src/lowbit/{room}" for room in ROOMS), "csrc"])
def test_a_room_has_a_short_page_on_it(folder: str) -> None:
    page = ROOT / folder / "README.md"
    assert page.is_file() and len(page.read_text("utf-8").splitlines()) <= 60


@pytest.mark.parametrize("page", PRESENT, ids=name_of)
def test_paragraphs_are_short(page: Path) -> None:
    parts = re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.) ?)", prose(page))
    assert not [part[:60] for part in parts if len(part) > 700 and "|" not in part[:2]]
