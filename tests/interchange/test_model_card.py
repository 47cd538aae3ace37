"""Model cards of strangers: what counts of their front matter, what is refused, and whose a README is."""

from __future__ import annotations

from pathlib import Path

import pytest

import lowbit
from lowbit.interchange.companions import companions_of, copy_companions
from lowbit.interchange.model_card import (
    BaseFacts,
    facts_of_folder,
    facts_of_gguf,
    facts_of_text,
    front_matter,
    is_marked,
    is_unchanged,
    repo_of_cache,
    sealed,
)
from tiny import save_tiny

GOOD = (
    "---\nlicense: Apache-2.0\nlanguage:\n- no\n- en\npipeline_tag: text-generation\nbase_model: org/other\n---\n# It\n"
)


def test_what_counts_of_a_card() -> None:
    found = facts_of_text(GOOD)
    assert (found.license, found.languages, found.task) == ("apache-2.0", ("no", "en"), "text-generation")
    assert found.base_model is None  # what a fine-tuned model names is not the model itself
    assert facts_of_text(GOOD.replace("\n", "\r\n")).license == "apache-2.0"


@pytest.mark.parametrize(
    "front",
    [
        "license: [", "license: &a [*a]", "a: &a [1]\nb: [*a, *a]\nlicense: mit", "- license: mit", "license: mit\n\t: x",
        "license: !!python/object/apply:os.system ['true']\nx: [", "x: " + "[" * 5000, "license: mit\nx: " + "y" * 70_000,
        "license: {a: b}", "license: 'mit\"><script>'", "license: |\n  mit\n  base_model: evil/x", "? [a]\n: b",
    ],
)  # fmt: skip
def test_hostile_front_matter_gives_no_licence(front: str) -> None:
    found = facts_of_text(f"---\n{front}\n---\n")
    assert found.license is None and found.base_model is None


@pytest.mark.parametrize(
    "link", ["javascript:alert(1)", "https://x y", "https://a)](b", "../../etc/passwd", "http://a.b"]
)
def test_links_that_are_none_are_left_out(link: str) -> None:
    assert facts_of_text(f"---\nlicense: other\nlicense_link: {link!r}\n---\n").license_link is None


def test_texts_without_front_matter() -> None:
    for text in ("", "# It", "---\nlicense: mit\n", "x\n---\nlicense: mit\n---\n"):
        assert front_matter(text) == {}


def test_a_readme_knows_whether_it_was_changed() -> None:
    text = sealed("# mine\n\ntext")
    assert is_marked(text) and is_unchanged(text)
    for changed in (text.replace("text", "my text"), text.replace("\n", "\r\n")):
        assert is_marked(changed) and not is_unchanged(changed)
    assert not is_marked("# mine") and not is_unchanged(text + "more")


def test_names_on_the_hub() -> None:
    assert repo_of_cache(Path("/c/models--org--name/snapshots/abc")) == "org/name"
    assert repo_of_cache(Path("/c/models--org--name/other/abc")) is None
    assert facts_of_gguf({"general.license": "mit", "general.base_model.0.repo_url": "https://huggingface.co/a/b"}) == (
        BaseFacts("a/b", "mit")
    )
    assert facts_of_gguf({"general.license": 3, "general.base_model.0.repo_url": "https://evil.co/a/b"}) == BaseFacts()


def test_the_readme_of_the_base_comes_back(tmp_path: Path) -> None:
    """Lowbit's README is of one folder; what is made of that folder has the README of the model before it."""
    folder, out = tmp_path / "q", tmp_path / "out"
    folder.mkdir(), out.mkdir()
    (folder / "README.md").write_text(sealed("---\nbase_model: org/name\n---\n# q"), "utf-8")
    assert companions_of(folder).taken == ()
    (folder / "README.base.md").write_bytes(GOOD.encode())
    copy_companions(folder, out)
    assert [file.name for file in out.iterdir()] == ["README.md"] and (out / "README.md").read_bytes() == GOOD.encode()
    found = facts_of_folder(folder)
    assert (found.base_model, found.license) == ("org/name", "apache-2.0")
    (folder / "README.md").write_text("# written by a user", "utf-8")
    assert companions_of(folder).taken == ("README.base.md", "README.md")


def test_sources_say_what_they_are(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "float", tokenizer=False)
    (tmp_path / "float/README.md").write_text(GOOD, "utf-8")
    made = lowbit.quantize(tmp_path / "float", "rotate+search@int4:g32", tmp_path / "q")
    assert made.source.facts() == facts_of_text(GOOD)  # through a transform too
