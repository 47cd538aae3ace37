"""The README.md of a quantized folder: a model card as the Hugging Face hub reads it, with the figures and how they were measured.

Metadata: https://huggingface.co/docs/hub/model-cards. Nothing is invented: what nobody says of the base model is left out, and said.
"""

from __future__ import annotations

import shlex
from typing import Any

from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.interchange.hf.heads import TASKS, auto_class
from lowbit.interchange.model_card import BASE_README, BaseFacts
from lowbit.measure.card import Card
from lowbit.measure.card_file import OWN
from lowbit.measure.markdown import markdown_table
from lowbit.measure.verdict import verdict_of
from lowbit.report.panel import card_lines

PROMPT = "What is the capital of France?"
_BITS = (2, 3, 4, 5, 6, 8)  # what the hub has as tags, such as 4-bit
_EMBEDDINGS = "sentence-similarity"  # the hub's task of models with sentence-transformers files


def readme(
    name: str, card: Card, facts: BaseFacts, *, architecture: str = "", target: str = OWN, command: str = "", embeds: bool = False,
) -> str:  # fmt: skip
    """The text of the README of the folder `name`. architecture: the model's class, "" where it is not known. embeds: whether the folder has
    files with which sentence-transformers makes embeddings."""
    auto = auto_class(architecture) if architecture else None
    task = _EMBEDDINGS if embeds else TASKS.get(auto or "")
    parts = [
        f"---\n{_yaml(_metadata(card, facts, task, target, embeds))}---",
        f"# {_line(name)}",
        f"{_of(facts)} quantized by lowbit with the recipe `{_code(card.parts.recipe)}`{_as(target)}.",
        *_measured(card, command),
        "## How to load it",
        _loading(name, "sentence-transformers" if embeds else auto, target),
        "## Base model and licence",
        _licence(facts) + (f" Its own card is [{BASE_README}]({BASE_README})." if facts.readme else ""),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(card: Card, facts: BaseFacts, task: str | None, target: str, embeds: bool) -> dict[str, Any]:
    bits = card.parts.linear_bits
    known = {
        "base_model": facts.base_model,
        "base_model_relation": "quantized" if facts.base_model else None,
        "license": facts.license,
        "license_name": facts.license_name if facts.license == "other" else None,
        "license_link": facts.license_link if facts.license == "other" else None,
        "language": list(facts.languages) or None,
        "library_name": OWN if target == OWN else "transformers",
        "pipeline_tag": facts.task or task,
    }
    few = [f"{int(bits)}-bit"] if bits is not None and int(bits) in _BITS else []
    tags = [
        "lowbit",
        "quantized",
        *(["sentence-transformers"] if embeds else []),
        *few,
        *(() if target == OWN else exporter_named(target).tags),
    ]
    return {key: value for key, value in known.items() if value is not None} | {"tags": list(dict.fromkeys(tags))}


def _measured(card: Card, command: str) -> list[str]:
    """What it cost, and how that was measured; what was kept, where there are no figures."""
    figures = [(name.strip(), value) for name, value in card_lines(card)]
    parts = ["## What it cost"]
    found = verdict_of(card)
    if found is not None:
        parts.append(f"**{found.word}**: {found.meaning}.")
    elif card.text is None and card.outputs is None:
        parts = ["## What it is", "What quantizing cost was not measured."]
    if figures:
        rows = [(_line(name), _line(value)) for name, value in figures]
        parts.append("\n".join(markdown_table(("figure", "value"), rows, left=("figure", "value"))))
    seen = card.environment
    if seen is not None:
        versions = f"lowbit {seen.lowbit}, PyTorch {seen.torch}, transformers {seen.transformers}, Python {seen.python}"
        tokens = "" if card.quality is None else f" Quality is of {card.quality.tokens:,} scored tokens."
        parts.append(f"Measured with {versions} on {_line(seen.machine)}.{tokens} ± is one standard error.")
    if command:
        parts.append(f"The command:\n\n{_block(command)}")
    if card.sample is not None:
        base = card.sample.base_answer
        said = [f"prompt: {card.sample.prompt}", *([] if base is None else [f"float:  {base}"])]
        parts.append(
            "An answer of both models, without sampling:\n\n"
            + _block("\n".join([*said, f"this:   {card.sample.answer}"]))
        )
    return parts


def _loading(name: str, auto: str | None, target: str) -> str:
    if target != OWN:
        return _block(exporter_named(target).loading.format(folder=name))
    python = [
        "import lowbit  # pip install lowbit; from here on transformers knows the folder",
        *_python(name, auto),
    ]
    text = f"In Python:\n\n{_block(chr(10).join(python))}"
    if auto == "AutoModelForCausalLM":
        command = f'lowbit generate {shlex.quote(name)} "{PROMPT}"'
        text += f"\n\nOn the command line:\n\n{_block(command)}"
    return text


def _python(name: str, way: str | None) -> list[str]:
    if way == "sentence-transformers":
        return ["from sentence_transformers import SentenceTransformer", f"model = SentenceTransformer({name!r})"]
    if way is None:
        return [f"model = lowbit.load({name!r})"]
    return [f"from transformers import {way}", f"model = {way}.from_pretrained({name!r})"]


def _licence(facts: BaseFacts) -> str:
    if facts.base_model is None:
        base = "The name of the base model on the hub was not known: add `base_model` above before you publish this folder."
    else:
        base = f"The base model is [{facts.base_model}](https://huggingface.co/{facts.base_model})."
    if facts.license is None:
        return f"{base} What it was made from names no licence. That of the base model holds here too: look it up and add `license` above."
    return f"{base} Its licence is `{facts.license}`, and holds for these weights too."


def _of(facts: BaseFacts) -> str:
    return (
        f"This is [{facts.base_model}](https://huggingface.co/{facts.base_model}),"
        if facts.base_model
        else "This model was"
    )


def _as(target: str) -> str:
    return "" if target == OWN else f" ({exporter_named(target).summary})"


def _yaml(metadata: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, default_flow_style=False))


def _line(text: str) -> str:
    """Text in a line of Markdown: no tag of HTML, no line end."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")


def _code(text: str) -> str:
    return " ".join(text.split()).replace("`", "'")


def _block(text: str) -> str:
    """A block of code by indentation, out of which no text can get."""
    return "\n".join(f"    {line}" for line in text.splitlines())
