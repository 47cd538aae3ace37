"""Model cards: what the README.md of a published model says of it in its YAML front matter, and whose a README.md is.

Format: https://huggingface.co/docs/hub/model-cards, section "Model card metadata". A README comes from strangers: it is
read with limits, scalars are taken as text, and of its fields only those below count, where they look as the hub has them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

README, BASE_README, CARD_FILE = "README.md", "README.base.md", "card.json"
_MOST_TEXT, _MOST_FRONT, _DEEPEST = 4 << 20, 64 << 10, 12  # bytes, characters, levels
_MOST_LANGUAGES = 200
_FRONT = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_HUB_URL = re.compile(r"https://(?:www\.)?huggingface\.co/([^/\s]+/[^/\s?#]+)/?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}")
_LICENSE_NAME = re.compile(r"[\w .,+()-]{1,96}", re.ASCII)
_LICENSE_LINK = re.compile(r"https://[^\s\"'<>`\\^{}|\[\]()]{3,300}|[A-Za-z][\w.-]{0,63}", re.ASCII)
_LANGUAGE = re.compile(r"[A-Za-z]{2,3}(?:[-_][A-Za-z0-9]{2,8}){0,3}|multilingual|code", re.ASCII)
_TASK = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+){1,6}")
_SEAL = re.compile(r"\n<!-- written by lowbit; ([0-9a-f]{64}) -->\s*\Z")


@dataclass(frozen=True)
class BaseFacts:
    """What is known of the published model that a folder was made from; a part is None where nobody says it.

    base_model    its name on the hub, `org/name`
    license       an identifier as the hub has them, with `license_name` and `license_link` where it is `other`
    languages     codes such as `en`
    task          what the hub calls the pipeline tag, such as `text-generation`
    readme        SHA-256 of the README.md that these facts are from, "" where there is none
    """

    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    task: str | None = None
    readme: str = ""


def repo_of(name: Any) -> str | None:
    """`name` where it can be the name of a model on the hub, else None."""
    return name if isinstance(name, str) and _REPO.fullmatch(name) and ".." not in name else None


def repo_of_cache(folder: Path) -> str | None:
    """The name on the hub of a folder in the hub's cache, `models--org--name/snapshots/...`; None for any other."""
    place = folder.absolute()
    parts = place.parent.parent.name.split("--") if place.parent.name == "snapshots" else []
    return repo_of("/".join(parts[1:])) if len(parts) == 3 and parts[0] == "models" else None


def facts_of_folder(folder: Path) -> BaseFacts:
    """The facts in the README of a folder; in a folder that has lowbit's README, those of the model it was made from."""
    own = text_of(folder / README)
    if not is_marked(own):
        return facts_of_text(own)
    facts, mine = facts_of_text(text_of(folder / BASE_README)), front_matter(own)
    known = facts if facts.readme else facts_of_text(own)
    return _with_base(known, mine.get("base_model"), facts.readme)


def facts_of_text(text: str) -> BaseFacts:
    """The facts in the front matter of a README of the model itself. What a README of a fine-tuned model names as its base is
    not this model, so `base_model` stays None."""
    found = front_matter(text)
    languages = found.get("language", ())
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    license = found.get("license")
    license = license[0] if isinstance(license, list) and license else license
    return BaseFacts(
        license=_like(_LICENSE, license.lower() if isinstance(license, str) else None),
        license_name=_like(_LICENSE_NAME, found.get("license_name")),
        license_link=_like(_LICENSE_LINK, found.get("license_link")),
        languages=tuple(word for word in languages[:_MOST_LANGUAGES] if _like(_LANGUAGE, word)),
        task=_like(_TASK, found.get("pipeline_tag")),
        readme=hashlib.sha256(text.encode()).hexdigest() if text else "",
    )


def facts_of_gguf(metadata: Mapping[str, Any]) -> BaseFacts:
    """What the `general.` keys of a GGUF file say, as llama.cpp's converter writes them."""
    license = metadata.get("general.license")
    url = metadata.get("general.base_model.0.repo_url") or metadata.get("general.source.url")
    found = _HUB_URL.fullmatch(url) if isinstance(url, str) else None
    return BaseFacts(
        base_model=None if found is None else repo_of(found[1]),
        license=_like(_LICENSE, license.lower() if isinstance(license, str) else None),
    )


def front_matter(text: str) -> dict[str, Any]:
    """The YAML mapping at the head of a README, every scalar as text; empty where there is none that can be read.

    Aliases, deep nesting and long front matter are taken for none: they are how small files become large in memory.
    """
    found = _FRONT.match(text)
    if found is None or len(found[1]) > _MOST_FRONT:
        return {}
    import yaml

    try:
        depth = 0
        for event in yaml.parse(found[1], Loader=yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > _DEEPEST:
                return {}
        value = yaml.load(found[1], Loader=yaml.BaseLoader)  # lists, mappings and texts only
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return {}
    return {key: item for key, item in value.items() if isinstance(key, str)} if isinstance(value, dict) else {}


def text_of(file: Path) -> str:
    """The text of a README; "" where there is none, or one that is no text or has more than 4 MiB."""
    try:
        return file.read_text("utf-8") if file.stat().st_size <= _MOST_TEXT else ""
    except (OSError, ValueError):
        return ""


def sealed(text: str) -> str:
    """`text` with a last line by which it is known again as lowbit's, and as unchanged."""
    text = text.rstrip() + "\n"
    return f"{text}\n<!-- written by lowbit; {_digest(text)} -->\n"


def is_marked(text: str) -> bool:
    """Whether a README is one that lowbit wrote, changed since or not."""
    return _SEAL.search(text) is not None


def is_unchanged(text: str) -> bool:
    """Whether a README is as lowbit wrote it."""
    found = _SEAL.search(text)
    return found is not None and found[1] == _digest(text[: found.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _with_base(facts: BaseFacts, base: Any, readme: str) -> BaseFacts:
    return replace(facts, base_model=repo_of(base), readme=readme)


def _like(pattern: re.Pattern[str], value: Any) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
