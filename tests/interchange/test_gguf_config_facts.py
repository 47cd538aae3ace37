"""Every field of every config that GGUF is written for, and every key of files of others: carried, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf_models import FAMILY_MODELS
from moe_models import MOE_MODELS

from config_changes import changes
from lowbit.errors import SourceError
from lowbit.families import families
from lowbit.families.config_facts import NEUTRAL
from lowbit.interchange.exporters.exporter import exporter_named
from lowbit.interchange.exporters.gguf import metadata
from lowbit.interchange.exporters.gguf.layout import bytes_in_file, place
from lowbit.interchange.exporters.gguf.metadata import config_facts, gguf_of
from lowbit.interchange.exporters.gguf.rope import rope_factors
from lowbit.interchange.opening import open_source
from lowbit.interchange.readers.gguf.rope import llama3_divisors, scaling_of
from lowbit.interchange.tensors import Contents, TensorPlan

FACTS = {name: config_facts(family) for name, family in families().items() if family.gguf}
MODELS = {**FAMILY_MODELS, **MOE_MODELS}
KINDS = {MODELS[name]().model_type: name for name in reversed(MODELS)}
IDS = torch.arange(3, 63)[None] % 128


def made(config: Any) -> Any:
    """A model of a config, its weights random and its biases not zero."""
    model = getattr(transformers, config.architectures[0])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return model.float().eval()


def logits(model: Any) -> Any:
    with torch.inference_mode():
        return model(IDS).logits


def contents_of(model: Any) -> tuple[Any, Contents]:
    source = open_source(model)
    params = source.inventory.params
    tensors = {
        n: TensorPlan(n, s.shape, params[n].kind, s.dtype, params[n].transposed) for n, s in source.tensors.items()
    }
    return source, Contents("model", "", model.config, tensors, source.inventory.tied)


def write_float(model: Any, file: Path, **extra: Any) -> None:
    """The model in float32 as the exporter lays it out, with `extra` keys of its architecture."""
    source, contents = contents_of(model)
    family = metadata.family_of(model.config)
    assert family is not None
    writer = gguf.GGUFWriter(file, gguf_of(family).architecture)
    metadata.describe(family, writer, model.config)
    for key, value in extra.items():
        name = f"{gguf_of(family).architecture}.{key.replace('__', '.')}"
        writer.kv_data[0].pop(name, None)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    writer.add_token_list([f"t{i}" for i in range(model.config.vocab_size)])
    for placed in place(family, contents):
        writer.add_tensor(placed.name, np.ascontiguousarray(bytes_in_file(placed, source.read(placed.tensor.name))))
    factors = rope_factors(model.config)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_every_family_has_its_facts() -> None:
    assert set(FACTS) == set(KINDS)


@pytest.mark.parametrize("kind", FACTS)
def test_every_field_of_the_class_is_listed(kind: str) -> None:
    """A field that a new transformers brings is to be added to the file of its family: read, fixed, or neutral."""
    assert not [name for name in transformers.CONFIG_MAPPING[kind]().to_dict() if name not in FACTS[kind]]


@pytest.mark.parametrize("kind", FACTS)
def test_every_changed_field_is_written_and_read_or_refused(kind: str, tmp_path: Path) -> None:
    base = MODELS[KINDS[kind]]()
    family, target = metadata.family_of(base), exporter_named("gguf")
    assert family is not None
    carried, refused = set[str](), set[str]()
    for name, value in changes(base):
        if name in NEUTRAL or name == "vocab_size":
            continue
        try:
            config = type(base)(**{**base.to_dict(), name: value})
            model = made(config)
            right = logits(model)
        except Exception:
            continue  # transformers itself has no such model
        problems = target.check(contents_of(model)[1])
        if problems:
            said = " ".join(p.reason + p.tensor for p in problems)
            known = name in said or "positions" in said or "scales its attention" in said or "llama.cpp" in said
            assert known, (name, value, said)
            refused.add(name)
        elif gguf_of(family).reader == "whole":
            file = tmp_path / "model.gguf"
            write_float(model, file)
            read = logits(open_source(file).load_float())
            assert float((read - right).norm() / right.norm()) < 0.02, (name, value)
            carried.add(name)
    assert refused and (len(carried) > 5 or gguf_of(family).reader == "own"), (refused, carried)


ROPES = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64},
    "a published llama3": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                           "original_max_position_embeddings": 8192},
    "an odd llama3": {"rope_type": "llama3", "factor": 3.3, "low_freq_factor": 0.7, "high_freq_factor": 9.0,
                      "original_max_position_embeddings": 50},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with a magnitude": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.6},
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.5, "mscale_all_dim": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("name", ROPES)
def test_scaled_positions_go_and_come_back(name: str, tmp_path: Path) -> None:
    config = MODELS["llama"]()
    config.rope_parameters = {"rope_theta": 5000.0, **ROPES[name]}
    model = made(config)
    write_float(model, tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    right, read = logits(model), logits(source.load_float())
    assert float((read - right).norm() / right.norm()) < 1e-4
    found = source.config.rope_parameters
    if (
        "odd" not in name and "published" not in name
    ):  # where the numbers are those that are published, they are found again
        for key, value in ROPES[name].items():
            if "mscale" not in key:
                assert found[key] == pytest.approx(value), key


@pytest.mark.parametrize("size", [8, 64, 128])
def test_llama3_is_found_from_its_factors_exactly_or_they_are_carried(size: int) -> None:
    published = ROPES["a published llama3"]
    divisors = llama3_divisors(published, size, 500000.0)
    assert scaling_of(divisors, 500000.0, 131072) == published
    odd = torch.linspace(1, 3, size // 2)
    found = scaling_of(odd, 500000.0, 131072)
    assert found["rope_type"] == "longrope" and found["long_factor"] == found["short_factor"] == odd.tolist()


def test_biases_of_llama_are_permuted_with_their_weights(tmp_path: Path) -> None:
    config = MODELS["llama"]()
    config.attention_bias = config.mlp_bias = True
    model = made(config)
    write_float(model, tmp_path / "m.gguf")
    there = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    bias = model.model.layers[1].self_attn.q_proj.bias.detach().numpy()  # 4 heads of 8: (i, i + 4) side by side
    np.testing.assert_array_equal(there["blk.1.attn_q.bias"].reshape(4, 4, 2).transpose(0, 2, 1).reshape(-1), bias)
    assert "blk.0.ffn_gate.bias" in there
    read = logits(open_source(tmp_path / "m.gguf").load_float())
    torch.testing.assert_close(read, logits(model), rtol=1e-4, atol=1e-4)


def test_a_window_in_a_llama_file_is_mistrals(tmp_path: Path) -> None:
    config = MODELS["mistral"]()
    config.sliding_window = 11
    model = made(config)
    write_float(model, tmp_path / "m.gguf", attention__sliding_window=11, rope__freq_base_swa=10000.0)
    source = open_source(tmp_path / "m.gguf")
    assert source.config.model_type == "llama"  # no more context than the window, so that it never begins to matter
    config.sliding_window = None
    write_float(model, tmp_path / "w.gguf", attention__sliding_window=11)
    config.sliding_window = 11
    right = logits(type(model)(config).eval())
    source = open_source(tmp_path / "w.gguf")
    assert source.config.model_type == "mistral" and source.config.sliding_window == 11
    windowed = type(model)(config).eval()
    windowed.load_state_dict(model.state_dict())
    right, read = logits(windowed), logits(source.load_float())
    assert float((read - right).norm() / right.norm()) < 1e-4


@pytest.mark.parametrize(("key", "value"), [
    ("attention__surprise", 3), ("logit_scale", 0.5), ("attention__sliding_window_pattern", 2), ("expert_count", 4),
    ("rope__scaling__yarn_log_multiplier", 0.7), ("attention__scale", 0.9), ("rope__dimension_count_swa", 4),
])  # fmt: skip
def test_keys_that_would_be_lost_are_named(key: str, value: Any, tmp_path: Path) -> None:
    write_float(made(MODELS["llama"]()), tmp_path / "m.gguf", **{key: value})
    with pytest.raises(SourceError, match=key.replace("__", r"\.")):
        open_source(tmp_path / "m.gguf")


def test_odd_numbers_are_refused_in_a_sentence(tmp_path: Path) -> None:
    model = made(MODELS["llama"]())
    for key, value in (("rope__scaling__factor", float("nan")), ("rope__scaling__factor", -2.0), ("rope__scaling__type", 3),
                       ("attention__key_length", 0.5), ("rope__scaling__yarn_ext_factor", float("inf"))):  # fmt: skip
        extra = {key: value} | ({} if "type" in key else {"rope__scaling__attn_factor": 1.0})
        write_float(model, tmp_path / "m.gguf", **extra)
        with pytest.raises(SourceError):
            open_source(tmp_path / "m.gguf")


def test_a_tensor_without_a_place_is_named(tmp_path: Path) -> None:
    model = made(MODELS["mistral"]())
    bias = torch.nn.Parameter(torch.ones(32))
    model.model.layers[0].self_attn.o_proj.bias = bias
    write_float(model, tmp_path / "m.gguf", attention__sliding_window=20)
    with pytest.raises(SourceError, match=r"blk\.0\.attn_output\.bias"):
        open_source(tmp_path / "m.gguf")
