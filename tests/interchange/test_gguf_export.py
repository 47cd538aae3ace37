"""GGUF files of every family: read back by foreign readers, and what cannot be written is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf_models import FAMILY_MODELS, save_model

import lowbit
from lowbit.errors import ExportError, OutputError
from lowbit.formats import parse_format
from lowbit.interchange.exporters.exporter import exporter_named, exporters
from lowbit.interchange.exporters.gguf.layout import names_in_file
from lowbit.interchange.exporters.gguf.metadata import family_of, gguf_of
from lowbit.interchange.exporters.gguf.mixes import MIXES, layer_types
from lowbit.interchange.exporters.gguf.rope import rope_factors
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.lowbit_folder import LowbitFolder
from lowbit.interchange.tensors import Contents, TensorPlan
from tiny import save_tiny

IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def written(room: Path, name: str, recipe: str = "q4_0,embed=q8_0") -> tuple[Path, Path]:
    """(lowbit's folder, the file) of a tiny model."""
    folder, file = room / f"{name}-q", room / f"{name}.gguf"
    if not file.exists():
        save_model(FAMILY_MODELS[name](), room / name)
        lowbit.quantize(room / name, recipe, folder)
        lowbit.export(folder, "gguf", file)
    return folder, file


def fields(file: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_every_family_comes_back_and_says_what_it_is(room: Path, name: str) -> None:
    folder, file = written(room, name)
    known, config = fields(file), LowbitFolder(folder).config
    family = family_of(config)
    assert family is not None
    prefix = known["general.architecture"]
    assert prefix == gguf_of(family).architecture
    assert known[f"{prefix}.block_count"] == 2 and known[f"{prefix}.embedding_length"] == 32
    assert known[f"{prefix}.feed_forward_length"] == (128 if name == "gpt2" else 64)
    assert known[f"{prefix}.attention.head_count"] == 4 and known[f"{prefix}.context_length"] == 128
    eps = "layer_norm_rms_epsilon" if family.norm == "rms" else "layer_norm_epsilon"
    assert known[f"{prefix}.attention.{eps}"] == pytest.approx(
        getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or config.layer_norm_epsilon
    )
    # transformers builds the tokenizer of a qwen2 config as Qwen2's, whatever tokenizer.json says.
    assert known["tokenizer.ggml.pre"] == ("qwen2" if name == "qwen2" else "gpt-2")
    assert len(known["tokenizer.ggml.tokens"]) == 128
    assert known["general.file_type"] == int(gguf.LlamaFileType.MOSTLY_Q4_0)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["token_embd.weight"] == "Q8_0" and types["output_norm.weight"] == "F32"
    assert types["blk.1.ffn_down.weight"] == "Q4_0"
    assert ("output.weight" in types) == (not LowbitFolder(folder).contents.tied)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2"])
def test_transformers_computes_our_model_from_the_file(room: Path, name: str) -> None:
    """All of it theirs: config, names, order of rows, numbers. Ours are the packed weights of the folder."""
    folder, file = written(room, name)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with torch.inference_mode():
        found = model.eval()(IDS).logits
        expected = lowbit.load(folder, dtype=torch.float32, kernel="dense")(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = open_source(room / name).tokenizer()
    assert tokenizer("the hen in a tree")["input_ids"] == ours("the hen in a tree")["input_ids"]


def test_the_same_command_writes_the_same_bytes(room: Path) -> None:
    folder, file = written(room, "qwen3")
    lowbit.export(folder, "gguf", room / "again.gguf")
    assert (room / "again.gguf").read_bytes() == file.read_bytes()


def test_scaled_positions_are_those_of_transformers(room: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = FAMILY_MODELS["llama-3.1"]()
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, 8, 2) / 8)
    factors = rope_factors(config)
    assert factors is not None
    torch.testing.assert_close(plain / factors, theirs, rtol=1e-5, atol=0)
    assert "rope_freqs.weight" in {t.name for t in gguf.GGUFReader(written(room, "llama-3.1")[1]).tensors}


def test_kept_weights_keep_their_type(room: Path) -> None:
    save_tiny("llama", room / "half")
    model = transformers.AutoModelForCausalLM.from_pretrained(room / "half", dtype=torch.bfloat16)
    model.save_pretrained(room / "half16")
    for file in (room / "half").glob("tok*"):
        (room / "half16" / file.name).write_bytes(file.read_bytes())
    lowbit.quantize(room / "half16", "q8_0,embed=keep,*.v_proj=keep", room / "half-q")
    made = lowbit.export(room / "half-q", "gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(made.path).tensors}
    assert types["token_embd.weight"] == types["blk.0.attn_v.weight"] == "BF16"
    assert types["blk.0.attn_q.weight"] == "Q8_0" and types["blk.0.attn_norm.weight"] == "F32"
    assert made.weights == 0.0


def contents(room: Path, name: str, **changes: Any) -> Contents:
    """A family's model with some tensors stored in another way."""
    save = room / f"{name}-plain"
    if not save.exists():
        save_model(FAMILY_MODELS[name](), save)
    source = open_source(save)
    params = source.inventory.params
    tensors = {
        n: TensorPlan(n, s.shape, params[n].kind, s.dtype, params[n].transposed) for n, s in source.tensors.items()
    }
    for tensor, text in changes.get("formats", {}).items():
        tensors[tensor] = TensorPlan(tensor, tensors[tensor].shape, "linear", torch.float32, format=parse_format(text))
    return Contents(name, "", changes.get("config", source.config), tensors, changes.get("tied", source.inventory.tied))


def test_what_cannot_be_held_is_said_with_the_nearest(room: Path) -> None:
    gate = "model.layers.0.mlp.gate_proj.weight"
    kind = exporters()["gguf"]
    assert kind.check(contents(room, "llama")) == []
    for text, near in {
        "int4:g64": "q4_0",
        "nf4:g64": "iq4_nl",
        "int8:channel": "q8_0",
        "uint4:g64:asym": "q4_1",
    }.items():
        (problem,) = kind.check(contents(room, "llama", formats={gate: text}))
        assert (problem.tensor, problem.nearest, problem.shape) == (gate, near, False) and text in problem.reason
    for text, near in {"q4_k": "iq4_nl", "q6_k": "q5_1", "q5_k": "q5_0"}.items():
        (problem,) = kind.check(contents(room, "llama", formats={gate: text}))
        assert (problem.nearest, problem.shape) == (near, True) and "256" in problem.reason
    (problem,) = kind.check(contents(room, "gemma", tied={}))
    assert "embedding as its head" in problem.reason
    config = FAMILY_MODELS["gemma2"]()
    config.query_pre_attn_scalar = 256
    assert "scales its attention" in kind.check(contents(room, "gemma2", config=config))[0].reason
    config = FAMILY_MODELS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "positions of the kind" in kind.check(contents(room, "llama", config=config))[0].reason
    (problem,) = kind.check(contents(room, "llama", config=None))
    assert "LlamaForCausalLM" in problem.nearest


def test_a_model_of_another_family_is_refused_before_anything_is_written(room: Path) -> None:
    save_tiny("bloom", room / "bloom")
    lowbit.quantize(room / "bloom", "q8_0,embed=q8_0", room / "bloom-q")
    with pytest.raises(ExportError, match=r"BloomForCausalLM is not among .* the nearest is LlamaForCausalLM"):
        lowbit.export(room / "bloom-q", "gguf", room / "bloom.gguf")
    assert not list(room.glob("bloom.gguf*"))


@pytest.mark.parametrize(
    ("typed", "name"),
    [("GGUF", "gguf"), ("ollama", "gguf"), ("llama.cpp", "gguf"), ("SGLang", "vllm"), ("GPTQModel", "gptq")],
)
def test_a_target_may_be_named_after_a_program_that_reads_it(typed: str, name: str) -> None:
    assert exporter_named(typed).name == name


def test_names_and_places_are_checked(room: Path) -> None:
    folder, file = written(room, "llama")
    with pytest.raises(ExportError, match=r"unknown target 'ggml'; did you mean 'gguf'"):
        lowbit.export(folder, "ggml")
    with pytest.raises(OutputError, match=r"ends in \.gguf"):
        lowbit.export(folder, "gguf", room / "x.bin")
    before = file.read_bytes()
    assert lowbit.export(folder, "gguf", file).nbytes == len(before)  # it is what this would write: done already
    file.write_bytes(before[:-1])
    with pytest.raises(OutputError, match="overwrite"):
        lowbit.export(folder, "gguf", file)
    assert lowbit.export(folder, "gguf", file, overwrite=True).nbytes == len(before)
    assert file.read_bytes() == before


def test_a_file_that_reads_back_otherwise_is_not_kept(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = written(room, "llama")
    kind = exporter_named("gguf")
    write = type(kind).write

    def spoiled(self: Any, model: Any, out: Path, progress: Any = None) -> None:
        write(self, model, out, progress)
        raw = bytearray(out.read_bytes())
        raw[-3] ^= 1
        out.write_bytes(raw)

    monkeypatch.setattr(type(kind), "write", spoiled)
    with pytest.raises(ExportError, match="is read back changed"):
        lowbit.export(folder, "gguf", room / "spoiled.gguf")
    assert not list(room.glob("spoiled*"))


@pytest.mark.parametrize("layers", [8, 30, 32])
def test_mixes_are_llama_quantizes(layers: int) -> None:
    """Which layers of Q4_K_M get Q6_K: counted by hand from the rule for 32 layers, and its properties for others."""
    config = transformers.LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=layers)
    family = family_of(config)
    names = [f"model.layers.{i}.{leaf}.weight" for i in range(layers) for leaf in ("self_attn.v_proj", "mlp.up_proj")]
    model = Contents("", "", config, {n: TensorPlan(n, (8, 256), "linear", torch.float32) for n in names}, {})
    assert family is not None
    found = layer_types(MIXES["q4_k_m"], names_in_file(family, model))
    assert set(found.values()) == {"q6_k"} and all("v_proj" in name for name in found)
    which = {int(name.split(".")[2]) for name in found}
    if layers == 32:
        assert which == {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
    assert {0, layers - 1} <= which
