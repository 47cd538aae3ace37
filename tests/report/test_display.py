"""Results show themselves: as tables, in one line, and as HTML in which nothing that a file brings is HTML."""

from __future__ import annotations

import dataclasses
import importlib
import re
from html.parser import HTMLParser
from typing import Any

import pytest

import lowbit
from lowbit.display import Displayed, as_text, visible
from lowbit.kv import CacheFormat
from lowbit.measure.speed import SpeedSettings
from lowbit.report.views import VIEWS
from tiny import save_tiny

TEXT = ["The cat sat on the mat and looked at the moon. " * 60]
FEW = SpeedSettings(prompt=4, new=4, prefill=8, batch=0, repeats=1)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of every result, by its class."""
    root = tmp_path_factory.mktemp("shown")
    save_tiny("llama", root / "m")
    made = lowbit.quantize(root / "m", "int4:g32", root / "q")
    found = [
        made, made.report, lowbit.plan(root / "m", "w4"), made.plan.recipe, made.plan.recipe.format,
        lowbit.inspect(root / "q"), lowbit.explain([-0.3, 0, 0.1, 0.7], "absmax"), lowbit.doctor(kernels=False),
        lowbit.recommend(root / "m", "8GB"), lowbit.catalogue("gptq"), lowbit.export(root / "q", "gptq", root / "gptq"),
        lowbit.dequantize_model(root / "q", root / "f"),
        lowbit.compare(root / "m", ["w8", "w4", "none such"], text=TEXT, windows=1, length=64),
        lowbit.evaluate(made, text=TEXT, windows=1, length=64), lowbit.bench(root / "q", rounds=1, settings=FEW),
        lowbit.allocate(root / "m", target_bits=5, calibration=TEXT, samples=4, length=128),
        lowbit.check_kv(root / "q", ["int8"], TEXT, context=64, windows=1, recommend=False),
        CacheFormat.of("k=int8,v=int4:g32,k:0=int16"), CacheFormat.of("rotate+search@int4:recent=32").keys,
    ]  # fmt: skip
    return {f"{type(each).__module__}.{type(each).__name__}".removeprefix("lowbit."): each for each in found}


def test_every_result_has_a_picture_and_every_picture_a_result(results: dict[str, Any]) -> None:
    def below(kind: type) -> set[type]:
        return {each for sub in kind.__subclasses__() for each in ({sub} | below(sub))}

    classes = {f"{kind.__module__}.{kind.__qualname__}".removeprefix("lowbit.") for kind in below(Displayed)}
    assert classes == set(VIEWS) == set(results)
    for name in (*VIEWS, *VIEWS.values()):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"lowbit.{module}"), attribute)


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_every_class_with_a_picture_says_what_it_is_in_a_few_words(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(f"lowbit.{module}"), attribute)
    assert kind._brief is not Displayed._brief and kind.__repr__ is Displayed.__repr__


def test_an_explanation_in_one_line() -> None:
    found = lowbit.explain([-0.3, 0, 0.1, 0.7], "absmax")
    assert repr(found) == f"Explanation(x, {found.recipe}, relative error {found.relative_error:.3g})"


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_a_result_is_one_short_line_and_a_table_within_80_columns(
    name: str, results: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = results[name]
    assert repr(result).startswith(f"{type(result).__name__}(") and len(repr(result)) <= 200
    assert "\n" not in repr(result)
    monkeypatch.setenv("COLUMNS", "80")
    text = as_text(result, 80)
    paths = [word for word in text.split() if len(word) > 40]  # of folders of this test, which no line may break
    assert all(len(line) <= 80 or any(path in line for path in paths) for line in text.splitlines())
    assert "\x1b" not in text and text.strip() and text == text.strip("\n")
    as_written = ("recipes.recipe.Recipe", "formats.format.Format", "kv.cache_format.CacheFormat", "kv.side.CacheSide")
    if name not in as_written:  # whose text is what recipes are written as
        assert str(result) == text


class Tags(HTMLParser):
    """What a page is made of: tags with their attributes, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def page(result: Any) -> Tags:
    tags = Tags()
    tags.feed(result._repr_html_())
    tags.close()
    return tags


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_html_is_one_block_of_coloured_text(name: str, results: dict[str, Any]) -> None:
    found = page(results[name])
    assert found.tags[0] == ("pre", ("style",)) and set(found.tags[1:]) <= {("span", ("style",))}
    assert found.text.split() == as_text(results[name], 100).split()


HOSTILE = "<img src=x onerror=alert(1)>[link=javascript:alert(2)]x[/link][bold]&amp;\x1b[2J\x9b1m\u202e</pre><script>"


def renamed(value: Any, old: str, new: str) -> Any:
    """A value with `old` replaced in every text that it holds."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list | tuple):
        return type(value)(renamed(each, old, new) for each in value) if type(value) in (list, tuple) else value
    if isinstance(value, dict):
        return {renamed(k, old, new): renamed(v, old, new) for k, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, lowbit.Format | type):
        texts = {f.name: renamed(getattr(value, f.name), old, new) for f in dataclasses.fields(value)}
        changed = {n: v for n, v in texts.items() if v is not getattr(value, n) and v != getattr(value, n)}
        try:
            return dataclasses.replace(value, **changed) if changed else value
        except (lowbit.LowbitError, ValueError):
            return value
    return value


@pytest.mark.parametrize("name", ["planning.plan.Plan", "pipeline.report.Report", "report.inspect.Inspection", "measure.card.Card"])  # fmt: skip
def test_names_that_a_model_brings_are_text_and_nothing_else(name: str, results: dict[str, Any]) -> None:
    old = {"measure.card.Card": "list of"}.get(name, "self_attn")
    hostile = renamed(results[name], old, HOSTILE)
    found = page(hostile)
    assert set(found.tags) <= {("pre", ("style",)), ("span", ("style",))}
    flat = re.sub(r"[\s│]+", "", found.text)
    assert "<imgsrc=xonerror=alert(1)>[link=javascript:alert(2)]x[/link][bold]&amp;\\x1b[2J\\x9b1m" in flat
    for text in (str(hostile), repr(hostile), hostile._repr_html_()):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_what_is_not_text_is_written_out() -> None:
    assert visible("a\x1b[31mb\n\tc\u202ed") == r"a\x1b[31mb" + "\n\tc\\u202e (right-to-left override)d"


def test_a_long_recipe_has_a_short_repr() -> None:
    recipe = lowbit.Recipe.parse("int4:g32," + ",".join(f"*.layers.{i}.*=int8:channel" for i in range(300)))
    assert len(repr(recipe)) <= 200 and repr(recipe).startswith("Recipe('int4:g32,") and repr(recipe).endswith("...)")
    assert len(str(recipe)) > 5000
    assert len(as_text(recipe, 80).splitlines()) < 60


def test_the_report_names_the_layers_and_their_errors(results: dict[str, Any]) -> None:
    report = results["pipeline.report.Report"]
    text = as_text(report, 80)
    rows = {layer.name: layer.error for layer in report.layers if layer.format is not None}
    worst = max(rows, key=rows.__getitem__)
    assert re.search(rf"largest errors +{100 * rows[worst]:.3g} % +{re.escape(worst)}", text)
    queries = [error for name, error in rows.items() if name.endswith("q_proj.weight")]
    mean = f"{100 * sum(queries) / len(queries):.3g}"
    assert re.search(rf"model\.layers\.\{{0-1\}}\.self_attn\.q_proj\.weight +int4:g32 +{re.escape(mean)}\n", text)
    assert "stays: " in text


def test_a_comparison_is_still_a_list(results: dict[str, Any]) -> None:
    rows = results["report.comparison.Comparison"]
    base, w8, _w4, wrong = rows
    assert isinstance(rows, list) and rows[0] is base and base.is_base and len(rows) == 4
    assert [record["recipe"] for record in rows.records()] == ["float32", "w8", "w4", "none such"]
    assert rows.records()[1]["kl"] == w8.card.quality.kl_mean.value and wrong.error in " ".join(str(rows).split())
    assert "| `w4` |" in rows.to_markdown() and rows.to_json().startswith("[")


def test_a_model_of_many_layers_prints_no_longer_than_one_of_two(results: dict[str, Any]) -> None:
    plan = results["planning.plan.Plan"]
    inner = [t for t in plan.tensors if "layers.0." in t.name]
    many = [
        dataclasses.replace(t, name=t.name.replace("layers.0.", f"layers.{i}.")) for i in range(2, 64) for t in inner
    ]
    deep = dataclasses.replace(plan, tensors=(*plan.tensors, *many), source_bytes=None)
    assert len(str(deep).splitlines()) == len(str(plan).splitlines()) and len(repr(deep)) <= 200
    assert "layers.{0-63}." in str(deep)
