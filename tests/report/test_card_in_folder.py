"""The card that a folder carries: what is written and when, what stays, and what a stranger may put there."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

import lowbit
from lowbit.errors import LowbitError, SourceError
from lowbit.interchange.model_card import BaseFacts, facts_of_folder, is_unchanged
from lowbit.measure.advice import advice
from lowbit.measure.card import Card, CardParts
from lowbit.measure.quality import Estimate
from lowbit.report import card as cards
from lowbit.report.panel import command_lines, render_card
from tiny import save_tiny, tiny_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "measure"))
from measure_models import full_card

BASE = "---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE\nlanguage: [no, en]\n---\n# Tiny, the float model\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "float")
    (tmp_path / "float/README.md").write_text(BASE, "utf-8")
    lowbit.quantize(tmp_path / "float", "w4", tmp_path / "q")
    return tmp_path / "q"


def made(folder: Path, **changes: object) -> cards.Made:
    facts = dataclasses.replace(facts_of_folder(folder.parent / "float"), base_model="org/tiny")
    return dataclasses.replace(cards.Made(facts, base="org/tiny", command="lowbit quantize org/tiny w4"), **changes)


def test_the_hub_reads_the_readme(folder: Path) -> None:
    """huggingface_hub as a foreign reader."""
    assert cards.keep(full_card(), folder, made(folder)) == ()
    data = ModelCard.load(folder / "README.md").data
    assert (data.base_model, data.base_model_relation, data.library_name) == ("org/tiny", "quantized", "lowbit")
    assert (data.license, data.license_name, data.license_link) == ("other", "my-licence", "LICENSE")
    assert (data.language, data.pipeline_tag) == (["no", "en"], "text-generation")
    assert {"lowbit", "quantized", "4-bit"} <= set(data.tags)
    text = (folder / "README.md").read_text("utf-8")
    for piece in ("0.04126 ± 0.00072", "24 windows of 1024", "24,552 scored tokens", "lowbit 0.1.0", "2 cores",
                  "lowbit quantize org/tiny w4", "AutoModelForCausalLM.from_pretrained('q')", "README.base.md"):  # fmt: skip
        assert piece in text, piece
    assert (folder / "README.base.md").read_text("utf-8") == BASE


def test_nothing_is_invented(folder: Path) -> None:
    (folder / "README.md").unlink()
    cards.keep(full_card(), folder, cards.Made(BaseFacts()))
    data, text = ModelCard.load(folder / "README.md").data, (folder / "README.md").read_text("utf-8")
    assert data.license is None and data.base_model is None
    assert "names no licence" in text and "was not known" in text


def test_the_card_comes_back_until_the_weights_change(folder: Path) -> None:
    cards.keep(full_card(), folder, made(folder))
    saved = cards.read(folder)
    assert lowbit.card(folder) == saved.card == full_card()
    assert cards.outdated(saved, folder) is None
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    said = cards.outdated(saved, folder)
    assert said is not None and "model.safetensors changed" in said and "lowbit evaluate" in said


def test_a_card_is_kept_from_python(folder: Path) -> None:
    assert lowbit.save_card(full_card(), folder, str(folder.parent / "float")) == ()
    assert ModelCard.load(folder / "README.md").data.license == "other" and lowbit.card(folder) == full_card()
    assert (folder / "README.base.md").read_text("utf-8") == BASE


def test_a_readme_of_the_user_stays(folder: Path) -> None:
    cards.keep(full_card(), folder, made(folder))
    own = (folder / "README.md").read_text("utf-8").replace("# q", "# My model")
    (folder / "README.md").write_text(own, "utf-8")
    for text in (own, "# all my own"):
        (folder / "README.md").write_text(text, "utf-8")
        (said,) = cards.keep(full_card(run_peak=7), folder, made(folder))
        assert "stays as it is" in said and "--rewrite" in said
        assert (folder / "README.md").read_text("utf-8") == text
        assert cards.read(folder).card.run_peak == 7
    assert cards.keep_readme(full_card(), folder, made(folder), rewrite=True) == ()
    assert is_unchanged((folder / "README.md").read_text("utf-8"))
    assert (folder / "README.base.md").read_text("utf-8") == BASE


def test_without_figures_a_readme_and_no_card(folder: Path) -> None:
    cards.keep(Card(CardParts("tiny", "w4")), folder, made(folder))
    assert "was not measured" in (folder / "README.md").read_text("utf-8") and not (folder / "card.json").exists()
    with pytest.raises(SourceError, match="lowbit evaluate .* --against"):
        lowbit.card(folder)
    cards.keep(full_card(), folder, made(folder))
    before = (folder / "README.md").read_bytes()
    cards.keep(Card(CardParts("tiny", "w4")), folder, made(folder))
    assert (folder / "README.md").read_bytes() == before  # figures are not thrown away


def test_a_second_run_and_what_is_made_of_the_folder(folder: Path, tmp_path: Path) -> None:
    cards.keep(full_card(), folder, made(folder))
    weights = (folder / "model.safetensors").read_bytes()
    lowbit.quantize(tmp_path / "float", "w4", folder)  # already done, and said so
    assert (folder / "model.safetensors").read_bytes() == weights and (folder / "card.json").exists()
    lowbit.dequantize_model(folder, tmp_path / "again")
    assert (tmp_path / "again/README.md").read_text("utf-8") == BASE and not (tmp_path / "again/card.json").exists()


def test_an_export_carries_the_card_of_its_weights(folder: Path, tmp_path: Path) -> None:
    lowbit.quantize(tmp_path / "float", "int4:g32,embed=keep", tmp_path / "k")
    cards.keep(full_card(), tmp_path / "k", made(folder))
    done = lowbit.export(tmp_path / "k", "gptq", tmp_path / "out")
    assert (tmp_path / "out/README.md").read_text("utf-8") == BASE
    assert cards.keep_of_export(tmp_path / "k", tmp_path / "out", "gptq", done.weights, done.unequal) == ()
    data, text = ModelCard.load(tmp_path / "out/README.md").data, (tmp_path / "out/README.md").read_text("utf-8")
    assert data.library_name == "transformers" and "gptq" in data.tags and data.base_model == "org/tiny"
    assert "lowbit's own folder" in text and "import lowbit" not in text
    assert lowbit.card(tmp_path / "out").speed is None
    lowbit.export(tmp_path / "k", "gptq", tmp_path / "out")  # already done: the README is no reason to refuse


HOSTILE = [
    "", "[]", "{", '{"parts": 1}', "[" * 100_000, '{"parts": {"model": "m", "recipe": "r", "parameters": ' + "9" * 5000 + "}}",
    '{"parts": {"model": "m", "recipe": "r", "parameters": 0}, "folder": {}}',
    '{"parts": {"model": "m", "recipe": "r", "coverage": {"quantized": 1, "total": 1, "kept": "abc"}}}',
    '{"parts": {"model": "m", "recipe": "r", "linear_bits": 1e400}}',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_card_is_refused_in_a_sentence(folder: Path, text: str) -> None:
    (folder / "card.json").write_text(text, "utf-8")
    with pytest.raises(SourceError, match=r"card\.json is not a card that lowbit wrote"):
        cards.read(folder)
    cards.keep(full_card(), folder, made(folder))  # and is replaced by a card that was measured
    assert cards.read(folder).card == full_card()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def test_any_field_may_be_anything(folder: Path) -> None:
    """Each field of a card replaced by each of these: a card that can be shown and written, or one sentence."""
    cards.keep(full_card(), folder, made(folder))
    file = folder / "card.json"
    text = file.read_text("utf-8")
    for path in [p for p in leaves(json.loads(text)) if p]:
        for value in (None, 0, -1, 1e300, 10**17, "inf", "nan", "", "[/bold]|`<b>\n---", [], {}, True, [[1]]):
            data = json.loads(text)
            place = data
            for key in path[:-1]:
                place = place[key]
            place[path[-1]] = value
            file.write_text(json.dumps(data), "utf-8")
            try:
                saved = cards.read(folder)
                late = cards.outdated(saved, folder)
            except SourceError as error:
                assert "is not a card" in str(error) and "\n" not in str(error), (path, value)
                continue
            assert late is None or "out of date" in late
            help = advice(saved.card, saved.base, saved.target)
            Console(file=StringIO(), width=80).print(render_card(saved.card, help))
            if saved.target == "lowbit":
                assert cards.text(saved, folder)


def test_texts_of_a_card_move_no_cursor(folder: Path) -> None:
    cards.keep(full_card(), folder, made(folder))
    data = json.loads((folder / "card.json").read_text("utf-8"))
    data["sample"]["answer"], data["parts"]["model"] = "a\x1b[2Jb", "x\u202ey"
    (folder / "card.json").write_text(json.dumps(data), "utf-8")
    found = cards.read(folder).card
    assert found.sample is not None and found.sample.answer == "a\ufffd[2Jb" and found.parts.model == "x\ufffdy"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder: Path) -> None:
    folder.chmod(0o500)
    with pytest.raises(LowbitError, match="cannot write"):
        cards.keep(full_card(), folder, made(folder))


def helped(kl: float, recipe: str, bits: float, calibrated: bool | None = False, target: str = "lowbit") -> list[str]:
    quality = dataclasses.replace(full_card().quality, kl_mean=Estimate(kl))
    parts = CardParts("m", recipe, 100, linear_bits=bits, calibrated=calibrated)
    return [" ".join(each.command) for each in advice(full_card(parts=parts, quality=quality), "org/tiny", target)]


def test_help_where_it_is_needed() -> None:
    assert helped(0.04, "w4 = search@int4:g32", 4.5) == []
    assert helped(0.27, "w4 = search@int4:g32", 4.5) == [
        "lowbit quantize org/tiny w4 --calibration builtin -o tiny-w4-calibrated",
        "lowbit quantize org/tiny w4 --target-bits 5.5 -o tiny-w4-5.5-bits",
        "lowbit quantize org/tiny w8",
    ]
    assert "--calibration" not in " ".join(helped(0.27, "w4 = qronos@int4:g32", 4.5, calibrated=True))
    assert helped(0.4, "w8 = absmax@int8:g128,embed=int8:g128", 8.14) == []
    assert helped(0.4, "gptq, 4 bits, groups of 16", 4.5) == []  # of another program: nothing is known
    assert all("--as gptq" in line for line in helped(0.4, "w4 = search@int4:g32", 4.5, target="gptq"))


def test_help_is_said_as_a_figure_only_where_it_was_measured() -> None:
    def why(recipe: str) -> str:
        parts = CardParts("m", recipe, 100, linear_bits=3.5, calibrated=False)
        quality = dataclasses.replace(full_card().quality, kl_mean=Estimate(1.0))
        return advice(full_card(parts=parts, quality=quality), "m")[0].why

    assert "about a quarter" in why("w4") and "about a quarter" in why("nl4")
    assert "usually" in why("w3") and "quarter" not in why("w3")


def test_commands_to_copy_fit_80_columns() -> None:
    words = (
        "lowbit",
        "quantize",
        "Organisation/A-Model-With-A-Long-Name",
        "w4",
        "--calibration",
        "self",
        "-o",
        "A-Model-With-A-Long-Name-w4-x",
    )
    lines = command_lines(words)
    assert max(map(len, lines)) <= 80 and len(lines) > 1
    assert " ".join(line.strip().removesuffix("\\").strip() for line in lines) == " ".join(words)


def test_card_and_help_within_80_columns() -> None:
    quality = dataclasses.replace(full_card().quality, kl_mean=Estimate(0.27))
    parts = dataclasses.replace(full_card().parts, recipe="w4 = search@int4:g32", calibrated=False)
    card, out = full_card(quality=quality, parts=parts), StringIO()
    Console(file=out, width=80).print(render_card(card, advice(card, "org/tiny")))
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert "0 is the float model itself" in out.getvalue() and "lowbit quantize org/tiny w8" in out.getvalue()


def test_the_card_of_an_embedding_model(tmp_path: Path) -> None:
    """Its figures, its verdict, what the hub calls its task, and how sentence-transformers loads it."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    base = tmp_path / "base"
    transformers.BertModel(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    kinds = (("Transformer", ""), ("Pooling", "1_Pooling"))
    (base / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds])
    )
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    lowbit.quantize(base, "w8", tmp_path / "q")
    card = lowbit.evaluate(tmp_path / "q", base, ["the tin and her hat then an inn " * 100], windows=12, length=20)
    assert lowbit.save_card(card, tmp_path / "q", str(base)) == ()
    text = (tmp_path / "q" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["pipeline_tag"] == "sentence-similarity" and "sentence-transformers" in head["tags"]
    assert (
        "SentenceTransformer('q')" in text
        and "| cosine of embeddings |" in text
        and "first token, as the model's folder" in text
    )
    assert "**indistinguishable**: its embeddings could not be told from those of the float model." in text
    assert lowbit.card(tmp_path / "q").outputs == card.outputs
