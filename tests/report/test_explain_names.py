"""What `explain` takes, and the sentences that it shows where something happens to a value."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import FormatError, RecipeError, SourceError, WeightError
from lowbit.formats import parse_format
from lowbit.report.explain import explain
from lowbit.report.explain_view import code_text
from lowbit.report.explain_what import Names, find
from lowbit.report.trace_view import folded
from tiny import save_tiny


def run(*words: object) -> str:
    done = CliRunner().invoke(app, ["explain", *map(str, words)], env={"COLUMNS": "80"}, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny("llama", folder)
    return folder


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_recipe_alone_has_an_array_of_its_own() -> None:
    assert "[-0.3, 0, 0.1, 0.7] is shown" in flat(run("nf4"))
    assert explain("int4:g32").recipe == "int4:g32"
    assert explain("qronos").recipe == "qronos@int4:g32", "a method in the simplest recipe that has it"
    assert explain("hqq@uint4:g32:zero=fp16").format == parse_format("uint4:g32:zero=fp16")


def test_nothing_at_all_prints_how_it_is_used() -> None:
    text = run()
    assert "lowbit explain nf4" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("text", ["nf5", "gptqq", "nonsense"])
def test_what_is_nothing_is_an_error_that_says_what_can_be_given(text: str) -> None:
    with pytest.raises(RecipeError, match="MODEL:TENSOR"):
        explain(text)


def test_a_spelling_of_a_format_is_not_taken_for_a_model() -> None:
    with pytest.raises(FormatError, match="int4:gg32|g32"):
        explain("int4:gg32")


def test_the_end_of_a_name_lists_the_names_that_end_so(model: Path) -> None:
    text = run(f"{model}:q_proj", "w8")
    assert "2 tensors" in text and "model.layers.1.self_attn.q_proj.weight" in text and "lowbit explain" in text
    data = json.loads(run(f"{model}:q_proj", "--json"))
    assert len(data["names"]) == 2 and data["first"].endswith('layers.0.self_attn.q_proj.weight"')
    with pytest.raises(SourceError, match=r"2 tensors .* end in q_proj"):
        explain(f"{model}:q_proj")
    assert find(f"{model}:1.self_attn.q_proj")[1] == "model.layers.1.self_attn.q_proj.weight", (
        "one ends so, and is taken"
    )
    assert explain(f"{model}:1.self_attn.q_proj", "w8").label == "model.layers.1.self_attn.q_proj.weight"


def test_a_model_alone_lists_its_kinds(model: Path) -> None:
    found = find(f"{model}:")
    assert isinstance(found, Names)
    assert "model.layers.0.self_attn.q_proj.weight" in found.names and not any(".1." in name for name in found.names)
    assert "kinds of tensors" in flat(run(f"{model}:"))


def test_a_tensor_of_a_model_is_shown_with_the_method_on_a_corner(model: Path) -> None:
    found = explain(f"{model}:model.layers.0.mlp.down_proj", "gptq")
    assert found.at_work and any("as a small weight of their own" in said for said in found.remarks)
    assert len(found.at_work[-1].outcome.codes[0]) <= 32
    for trace in found.at_work:
        rows, columns = len(trace.outcome.codes), len(trace.outcome.codes[0])
        assert trace.parts[0] == f"Of {rows * columns} weights, the first {rows} rows and {columns} columns."
        assert trace.outcome.measure.endswith(f", all {rows} rows")
    assert f"with the same scales (row 0 of {rows}):" in flat(str(found))


def test_lists_and_tensors_are_taken_and_the_text_is_that_of_the_command() -> None:
    array = "[-0.3, 0, 0.1, 0.7]"
    given = [
        explain(array, "nf4"),
        explain([-0.3, 0, 0.1, 0.7], "nf4"),
        explain(torch.tensor([-0.3, 0, 0.1, 0.7]), "nf4"),
    ]
    assert len({str(found) for found in given}) == 1
    assert "\n".join(line.rstrip() for line in run(array, "nf4").splitlines()).rstrip() == str(given[0]).rstrip()


def test_a_quantized_scale_shows_its_own_code_and_scale() -> None:
    x = torch.tensor([[-0.3, 0.0, 0.1, 0.7], [0.05, 0.2, -0.1, 0.35]])
    for recipe in ("absmax@nf4:g4:s=(uint8:g256:s=fp32)", "search@uint3:g4:s=(uint6:g8):min=(int6:g8)"):
        q = lowbit.quantize_tensor(x, recipe)
        found = explain(x, recipe)
        for i, block in enumerate(found.blocks):
            code, step = int(q.scale.unpacked()[i]), float(q.scale.scales().reshape(-1)[0])
            assert f"code {code}" in block.steps[0].parts and f"{code} x {step:.7g}" in block.steps[0].parts
            assert block.steps[0].stored == pytest.approx(code * step, rel=1e-6)
    assert "2^(124 - 127) = 0.125" in explain("mxfp4").blocks[0].steps[0].parts
    assert (
        "code 126, level 448 in e4m3 (fp8: a sign, 4 bits of exponent, 3" in explain("nvfp4").blocks[0].steps[0].parts
    )


def remark(array: str, recipe: str) -> str:
    return " ".join(explain(array, recipe).blocks[0].remarks)


def test_ties_go_to_the_even_level_and_say_so() -> None:
    said = remark("[127, 2.5, 3.5]", "absmax@int8:tensor")
    assert "2.5 goes to 2" in said and "3.5 goes to 4" in said and "even level" in said
    assert "-26.5" in remark("[-0.3, 0, 0.1, 0.7]", "zeropoint"), "looks like a tie and is none"
    assert "Ties" not in remark("[127, 2.4]", "absmax@int8:tensor")


def test_clipped_values_say_so() -> None:
    said = remark("[-0.3, 0, 0.1, 0.7]", "symmetric")
    assert "Clipped: x = 0.7" not in said or "highest level 127" in said
    said = remark("[0.01, 0.02, -0.01, 5]", "percentile(p=50)@int8:tensor")
    assert "x = 5 is at" in said and "highest level 127" in said
    assert "Clipped" not in remark("[1, 2, 3]", "absmax@int8:tensor")


def test_a_rounded_zero_point_says_why_the_highest_value_does_not_get_the_highest_level() -> None:
    said = remark("[-0.3, 0, 0.1, 0.7]", "zeropoint")
    assert "from -51.5 to -52, which moves all levels by -0.5: the highest value 0.7 gets 126, not 127" in said
    assert "moves all levels" not in remark("[-1, 0, 0.5, 1.55]", "minmax@uint8:tensor:zero=fp32")


@pytest.mark.parametrize("fmt", ["int4:g32", "uint4:g32:min=fp16", "mxfp4", "e4m3:channel", "e5m2:channel", "nf4", "bnb_fp4", "iq4nl:g32"])  # fmt: skip
def test_how_a_code_comes_from_its_level(fmt: str) -> None:
    found = explain("[[-0.3, 0, 0.1, 0.7], [-2, 1, 0.05, 0.4]]", fmt)
    said = flat(code_text(found.format))
    assert f"code {said}" in flat(str(found)), "one line of the block says it"
    for block in found.blocks:
        for level, code in zip(block.levels, block.codes, strict=True):
            if "level + " in said or said == "code = level":
                exact = int(level) + int(said.partition("level + ")[2] or 0)
            elif "bits of exponent" in said:
                e, m = (int(digit) for digit in said.rpartition("(e")[2].rstrip(")").split("m"))
                top, low = code >> m & (1 << e) - 1, code & (1 << m) - 1
                size = (
                    (1 + low / 2**m) * 2.0 ** (top - 2 ** (e - 1) + 1)
                    if top
                    else low / 2**m * 2.0 ** (2 - 2 ** (e - 1))
                )
                assert (-size if code >> e + m else size) == level
                continue
            else:
                listed = [float(v) for v in said.partition("0: ")[2].split()] or sorted(
                    found.format.grid.levels.tolist()
                )
                exact = min(range(len(listed)), key=lambda i: abs(listed[i] - level))
            assert exact == code


def test_rounding_of_float32_is_no_error() -> None:
    found = explain("[0.9, 0.2]", "minmax@uint8:g32:min=fp32")
    assert 0 < found.blocks[0].errors[1] < 1e-7, "so the test has something to see"
    assert "+1.49e-08" not in str(found)
    assert "-1e-09" in str(explain("[1e-9, 1]", "absmax@int8:channel")), "a value that is lost is one"


def test_a_tensor_that_the_recipe_treats_in_another_way_says_so(model: Path) -> None:
    said = " ".join(explain(f"{model}:model.norm.weight", "w4").remarks)
    assert "A recipe keeps this tensor in float (norms); it is shown because you asked." in said
    found = explain(f"{model}:model.embed_tokens", "w4")
    assert f"stores this tensor in {found.format}, and linear layers in int4:g32." in " ".join(found.remarks)
    assert "stores this tensor" not in " ".join(explain(f"{model}:0.self_attn.q_proj", "w4").remarks)
    some = explain(f"{model}:0.self_attn.q_proj", "int4:channel")
    assert f"1 of {some.block_count} blocks is shown" in flat(str(some))


def test_a_linear_layer_is_suggested_before_the_embedding(model: Path) -> None:
    found = find(f"{model}:")
    assert "q_proj" in found.names[0] and {"embed_tokens", "lm_head"} == {n.split(".")[-2] for n in found.names[-2:]}


def test_negative_scales_and_levels_that_nothing_uses() -> None:
    assert "scale is negative" in remark("[0.8, -0.1, 0.3, 0.2]", "search@int4:g32")
    assert "narrow" in remark("[1, 2]", "absmax@int8:tensor:narrow")
    assert "absmax takes" in remark("[1, 2]", "absmax@int8:tensor")
    assert "negative" not in remark("[1, 2]", "absmax@int8:tensor")


def test_bits_are_those_of_the_array_and_of_whole_blocks() -> None:
    found = explain("[-0.3, 0, 0.1, 0.7]", "int4:g32")
    assert found.bits_per_weight == 8 and found.bits_from.endswith("4 + 16/32 = 4.5 bits")
    for recipe in ("nf4", "w3", "w2", "int4:g32", "uint4:g32:min=fp16", "uint4:g64:asym", "mxfp4"):
        fmt = lowbit.Recipe.parse(recipe).format
        whole = float(explain([[0.1, -0.2]], recipe).bits_from.removesuffix(" bits").rpartition("= ")[2])
        assert whole == pytest.approx(fmt.bits_per_weight((4096, 4096)), abs=1e-4)


def test_wide_tables_fold_into_blocks_of_columns() -> None:
    heads = ("row", *(f"column {i}" for i in range(20)))
    text = folded(heads, [(0, *(i + 0.123 for i in range(20)))], 80)
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"column {i}" in text for i in range(20)) and "19.12" in text


def test_quantize_tensor_takes_lists_as_explain_does() -> None:
    given, found = lowbit.quantize_tensor([-0.3, 0, 0.1, 0.7], "absmax"), explain("[-0.3, 0, 0.1, 0.7]", "absmax")
    assert tuple(given.unpacked().tolist()) == found.blocks[0].codes
    with pytest.raises(WeightError, match="lists of one length"):
        lowbit.quantize_tensor([[1, 2], [3]], "absmax")
