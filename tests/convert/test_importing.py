"""Models of other programs become folders of lowbit with the same integers, and any model an ordinary float folder again."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowbit
from lowbit.cli.main import app
from lowbit.errors import OutputError, RecipeError, SourceError, WeightError
from lowbit.interchange.opening import open_source
from lowbit.kernels.core import core
from lowbit.nn.swap import packed_weights
from quantized_folders import awq_layer, bnb4_layer, gptq_layer, int8_layer, save_quantized
from tiny import TINY, save_tiny, tiny_tokenizer

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def gptq(tmp_path: Path) -> Path:
    save_quantized(tmp_path / "gptq", GPTQ, gptq_layer)
    return tmp_path / "gptq"


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("section", [GPTQ, AWQ], ids=["gptq", "awq"])
def test_an_import_has_the_integers_of_its_source(section: dict[str, Any], tmp_path: Path) -> None:
    layer = gptq_layer if section is GPTQ else awq_layer
    true = save_quantized(tmp_path / "in", section, layer)
    made = lowbit.import_model(tmp_path / "in", tmp_path / "out")
    by_name = {entry.name: entry for entry in made.report.layers}
    packed = dict(packed_weights(lowbit.load(tmp_path / "out")))
    assert packed.keys() == true.keys()
    for name, dense in true.items():
        assert by_name[name].error == 0.0 and by_name[name].format == (
            "int4:g16" if section is GPTQ else "uint4:g16:asym"
        )
        assert torch.allclose(packed[name].dequantize(torch.float32).double(), dense, rtol=1e-6, atol=1e-7)
    codes, _, _ = open_source(tmp_path / "in").stored_as(NAME), None, None
    assert (
        codes is not None and codes.read is not None and torch.equal(codes.read().codes, packed[NAME].qtensor().codes)
    )
    stored, floats = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "in" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], floats["lm_head.weight"]) and made.plan.recipe.name.startswith(
        "import of "
    )
    scales = floats[NAME.replace("weight", "scales")]
    assert torch.equal(stored[f"{NAME}.scale"], scales.T.reshape(1, *scales.T.shape))


def test_its_logits_are_those_of_the_values(gptq: Path, tmp_path: Path) -> None:
    lowbit.import_model(gptq, tmp_path / "out")
    ids = torch.arange(20).view(1, -1)
    with torch.no_grad():
        wanted = open_source(gptq).load_float()(ids).logits
        found = lowbit.load(tmp_path / "out", dtype="float32", kernel="expand")(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.mark.skipif(core() is None, reason="lowbit._core is not built")
def test_the_engine_runs_a_quantized_source_at_its_packed_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}  # the engine takes heads of 16 channels
    monkeypatch.setitem(TINY, "llama", lambda: transformers.LlamaConfig(**TINY["llama-tied"]().to_dict() | wide))
    save_quantized(tmp_path / "gptq", GPTQ | {"group_size": 32}, lambda w: gptq_layer(w, group=32))
    lowbit.import_model(tmp_path / "gptq", tmp_path / "out")
    direct, imported = lowbit.Engine.open(tmp_path / "gptq"), lowbit.Engine.open(tmp_path / "out")
    assert direct.describe() == imported.describe()
    assert (
        direct.generate("the end", max_new_tokens=12, raw=True).text
        == imported.generate("the end", max_new_tokens=12, raw=True).text
    )


def test_what_no_format_holds_is_kept_as_float_or_quantized_anew_and_says_so(tmp_path: Path) -> None:
    save_quantized(tmp_path / "in", GPTQ | {"desc_act": True}, lambda w: gptq_layer(w, by_order=True))
    facts = json.loads(run("import", tmp_path / "in", "-o", tmp_path / "kept", "--json"))
    reason = "kept as float: desc_act put its columns into groups that are not consecutive"
    assert facts["exact"] == {} and facts["others"] == {reason: {"tensors": 14, "format": "float", "error": 0.0}}
    facts = json.loads(run("import", tmp_path / "in", "-o", tmp_path / "anew", "--rest", "int8:g16", "--json"))
    (entry,) = facts["others"].values()
    assert entry["tensors"] == 14 and entry["format"] == "int8:g16" and 1e-3 < entry["error"] < 1e-2
    text = run("import", tmp_path / "in", "-o", tmp_path / "anew", "--rest", "int8:g16", "--overwrite")
    assert "no tensor could be kept as it is" in text and "14 tensors as int8:g16, relative error up to 0.00" in text


def test_values_are_rounded_to_the_type_of_the_model_and_the_loss_is_stated(tmp_path: Path) -> None:
    save_quantized(tmp_path / "in", GPTQ | {"desc_act": True}, lambda w: gptq_layer(w, by_order=True))
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    made = lowbit.import_model(tmp_path / "in", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")[NAME]
    true = open_source(tmp_path / "in").read(NAME)
    error = next(entry.error for entry in made.report.layers if entry.name == NAME)
    assert torch.equal(stored, true.bfloat16()) and error == pytest.approx(
        float((stored - true).norm() / true.norm()), rel=1e-4
    )


def test_inputs_come_along(tmp_path: Path) -> None:
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["re:.*_proj"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
             "input_activations": activations}  # fmt: skip
    section = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": group}}
    save_quantized(tmp_path / "in", section, int8_layer)
    lowbit.import_model(tmp_path / "in", tmp_path / "out")
    assert {str(w.inputs) for _, w in packed_weights(lowbit.load(tmp_path / "out"))} == {"int8:token"}


def test_the_same_import_gives_the_same_bytes(gptq: Path, tmp_path: Path) -> None:
    digests = []
    for out in ("a", "b"):
        lowbit.import_model(gptq, tmp_path / out)
        files = sorted((tmp_path / out).iterdir())
        digests.append([(f.name, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files])
    assert digests[0] == digests[1]


def test_every_command_takes_a_quantized_source(gptq: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the end and then the other " * 40)
    plan = json.loads(run("plan", gptq, "w8", "--json"))
    assert plan["source_bytes"] < plan["bytes_before"]
    assert "q_proj.weight" in run("inspect", gptq, "--all")
    card = run("evaluate", gptq, "--text", text, "--length", "32", "--windows", "2", "--json")
    assert "gptq, 4 bits, groups of 16" in card and json.loads(card)
    run("quantize", gptq, "w8", "-o", tmp_path / "w8", "--no-card")
    run("quantize", tmp_path / "w8", "w4", "-o", tmp_path / "w4", "--no-card")
    assert "error" in run("explain", f"{gptq}:{NAME}", "w4")


@pytest.mark.parametrize("model", ["llama-tied", "gpt2", "mixtral", "t5"])
def test_a_dequantized_folder_is_an_ordinary_one(model: str, tmp_path: Path) -> None:
    float_model = save_tiny(model, tmp_path / "float")
    lowbit.quantize(tmp_path / "float", "w8", tmp_path / "w8")
    made = lowbit.dequantize_model(tmp_path / "w8", tmp_path / "again")
    assert made.error == 0.0 and made.dtype == torch.float32
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("float", "again"))
    assert {n: t.shape for n, t in before.items()} == {
        n: t.shape for n, t in after.items()
    }  # as save_pretrained names them
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "quantization_config" not in config and made.tensors <= len(after)
    opened = type(float_model).from_pretrained(tmp_path / "again")
    packed = lowbit.load(tmp_path / "w8", kernel="dense").state_dict()
    assert all(torch.equal(value, packed[name]) for name, value in opened.state_dict().items())
    assert type(opened.lm_head.weight) is torch.nn.Parameter


def test_dequantizing_says_what_rounding_cost(gptq: Path, tmp_path: Path) -> None:
    facts = json.loads(run("dequantize", gptq, "-o", tmp_path / "out", "--dtype", "bfloat16", "--json"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = open_source(gptq)
    errors = [(source.read(n).double() - stored[n].double()).square().sum() for n in source.tensors]
    norms = [source.read(n).double().square().sum() for n in source.tensors]
    assert facts["error"] == pytest.approx(float((sum(errors) / sum(norms)) ** 0.5), rel=1e-6)
    assert {t.dtype for t in stored.values()} == {torch.bfloat16} and facts["dtype"] == "bfloat16"
    assert "rounding cost a relative error of 0.00" in run(
        "dequantize", gptq, "-o", tmp_path / "half", "--dtype", "float16"
    )
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab() == tiny_tokenizer().get_vocab()


def test_what_is_refused(gptq: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "float")
    with pytest.raises(RecipeError, match="is a float model, so there is nothing to import"):
        lowbit.import_model(tmp_path / "float", tmp_path / "out")
    with pytest.raises(OutputError, match="holds the model that is read"):
        lowbit.import_model(gptq, gptq, overwrite=True)
    with pytest.raises(OutputError, match="holds the model that is read"):
        lowbit.dequantize_model(gptq, gptq, overwrite=True)
    with pytest.raises(RecipeError, match="unknown dtype 'int4'"):
        lowbit.dequantize_model(gptq, tmp_path / "out", dtype="int4")
    save_quantized(tmp_path / "huge", GPTQ, lambda w: gptq_layer(w * 1e6))
    with pytest.raises(WeightError, match="_proj.weight"):
        lowbit.dequantize_model(tmp_path / "huge", tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_a_gguf_file_is_imported_block_by_block(tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    source = save_tiny("llama", tmp_path / "float")
    out, random = GGUFWriter(tmp_path / "m.gguf", "llama"), np.random.default_rng(0)
    out.add_block_count(2), out.add_context_length(128), out.add_embedding_length(32), out.add_feed_forward_length(64)
    out.add_head_count(4), out.add_head_count_kv(2), out.add_layer_norm_rms_eps(1e-5), out.add_vocab_size(128)
    out.add_token_list([f"t{i}" for i in range(128)])
    kinds = {
        "attn_q": "Q4_0",
        "attn_k": "Q5_0",
        "attn_v": "Q4_1",
        "attn_output": "Q8_0",
        "ffn_gate": "IQ4_NL",
        "ffn_up": "Q5_1",
    }
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32), "ffn_gate": (64, 32),
              "ffn_up": (64, 32), "ffn_down": (32, 64)}  # fmt: skip
    for name in ("token_embd", "output"):
        out.add_tensor(f"{name}.weight", random.standard_normal((128, 32)).astype(np.float16))
    out.add_tensor("output_norm.weight", np.ones(32, np.float32))
    for block in range(2):
        for name in ("attn_norm", "ffn_norm"):
            out.add_tensor(f"blk.{block}.{name}.weight", np.ones(32, np.float32))
        for name, shape in shapes.items():
            kind = GGMLQuantizationType[kinds.get(name, "Q4_0")]
            values = random.standard_normal(shape).astype(np.float32)
            raw = quantize(values, kind) if name != "ffn_gate" else random.integers(0, 60, (64, 18), dtype=np.uint8)
            out.add_tensor(f"blk.{block}.{name}.weight", raw, raw_dtype=kind)
    out.write_header_to_file(), out.write_kv_data_to_file(), out.write_tensors_to_file(), out.close()
    made = lowbit.import_model(tmp_path / "m.gguf", tmp_path / "out", tokenizer=tiny_tokenizer())
    formats = {
        entry.name.split(".")[-2]: entry.format for entry in made.report.layers if ".0." in entry.name and entry.format
    }
    assert formats == {
        "q_proj": "int4:g32", "k_proj": "int5:g32", "v_proj": "uint4:g32:min=fp16", "o_proj": "int8:g32",
        "gate_proj": "iq4nl:g32", "up_proj": "uint5:g32:min=fp16", "down_proj": "int4:g32",
    }  # fmt: skip
    assert all(entry.error == 0.0 for entry in made.report.layers)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight"].dtype == torch.float16 and source.config.vocab_size == 128


def test_double_quantized_scales_are_kept_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    section = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    save_quantized(tmp_path / "in", section, lambda w: bnb4_layer(w, nested=True))
    made = lowbit.import_model(tmp_path / "in", tmp_path / "out")
    assert {e.format for e in made.report.layers if e.format} == {"nf4:g32:s=fp32"} and all(
        e.error == 0 for e in made.report.layers
    )


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"sym": "maybe"}, "sym is 'maybe', and it must be true or false"),
        ({"desc_act": []}, "desc_act is a list of 0, and it must be true or false"),
        ({"dynamic": ["x"]}, "dynamic is a list of 1, and it must be an object"),
        ({"dynamic": {"(": {"bits": 8}}}, "no settings by regular expression"),
        ({"dynamic": {"model": 3}}, "each value an object"),
    ],
)
def test_settings_of_the_wrong_kind_are_refused(gptq: Path, tmp_path: Path, said: dict[str, Any], problem: str) -> None:
    shutil.copytree(gptq, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"] |= said
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=problem):
        lowbit.import_model(tmp_path / "in", tmp_path / "out")


def test_bits_are_those_of_the_tensors(gptq: Path, tmp_path: Path) -> None:
    shutil.copytree(gptq, tmp_path / "in")
    config = json.loads((tmp_path / "in/config.json").read_text())
    config["quantization_config"]["bits"] = 8
    (tmp_path / "in/config.json").write_text(json.dumps(config))
    assert "gptq, 4 bits, groups of 16" in open_source(str(tmp_path / "in")).storage
