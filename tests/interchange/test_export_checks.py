"""The static check of each target: what it refuses, how it says so, and that the nearest it names is held."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import parse_format, parse_inputs
from lowbit.interchange.exporters.common.folder_exporter import FolderExporter
from lowbit.interchange.exporters.exporter import exporters
from lowbit.interchange.tensors import Contents, TensorPlan
from tiny import TINY

NAMES = ("awq", "gptq", "vllm")
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")


def layer(name: str, fmt: str | None, inputs: str | None = None, shape: tuple[int, ...] = (64, 256)) -> TensorPlan:
    return TensorPlan(
        f"model.layers.0.{name}.weight", shape, "linear", torch.float32, False,
        None if fmt is None else parse_format(fmt), inputs=None if inputs is None else parse_inputs(inputs),
    )  # fmt: skip


def model(*layers: TensorPlan) -> Contents:
    return Contents("m", "", TINY["llama"](), {t.name: t for t in layers}, {})


def folder_exporter(name: str) -> FolderExporter:
    found = exporters()[name]
    assert isinstance(found, FolderExporter)
    return found


@pytest.mark.parametrize(
    ("target", "fmt", "inputs", "reason", "nearest"),
    [
        ("vllm", "nf4:g64", None, "has no nf4", "int4:g64"),
        ("vllm", "kmeans4:channel", None, "has no kmeans4", "int4:channel"),
        ("vllm", "int4:g16", None, "groups are of 16", "int4:g32"),
        ("vllm", "int4:g96", None, "do not divide its 256", "int4:g64"),
        ("vllm", "int3:g32", None, "3 bits", "int4:g32"),
        ("vllm", "uint4:g64:zero=fp16", None, "zero-points are no integers", "uint4:g64:asym"),
        ("vllm", "uint8:g64:asym", None, "zero-points", "int8:g64"),
        ("vllm", "int8:*x128", None, "blocks of", "int8:channel"),
        ("vllm", "e5m2:channel", None, "e5m2", "e4m3:channel"),
        ("vllm", "e4m3:g64", None, "blocks of g64", "e4m3:channel"),
        ("vllm", "int8:channel", "int8:g64", "a scale there is for one token", "a=int8:token"),
        ("vllm", "int8:channel", "int8:tensor", "a scale there is for one token", "a=int8:token"),
        ("vllm", "int8:channel", "int8:token:divisor", "divides its inputs", "a=int8:token"),
        ("vllm", "int8:channel", "int8:token:outliers=6", "outliers", "a=int8:token"),
        ("vllm", "int8:channel", "e4m3:token", "inputs in e4m3", "a=int8:token"),
        ("vllm", "e4m3:channel", "int8:token", "inputs in int8", "a=fp8:token"),
        ("vllm", "int8:g64", "int8:token", "one scale a row", "int8:channel"),
        ("vllm", "uint4:g64:asym", "int8:token", "zero-points", "int4:g64"),
        ("vllm", "mxfp4", "int8:token", "stay float", "the same recipe without a="),
        ("gptq", "int5:g32", None, "5 bits", "int8:g32"),
        ("gptq", "int4:g32", "int8:token", "GPTQ keeps inputs float", "the same recipe without a="),
        ("gptq", "e4m3:channel", None, "no consecutive integers", "int8:channel"),
        ("awq", "int8:channel", None, "8 bits", "uint4:channel:asym"),
        ("awq", "int4:g16", None, "groups of 16", "uint4:g32:asym"),
    ],
)
def test_refusals_name_layer_reason_and_nearest(
    target: str, fmt: str, inputs: str | None, reason: str, nearest: str
) -> None:
    (problem,) = folder_exporter(target).check(model(layer("mlp.down_proj", fmt, inputs)))
    assert problem.tensor == "model.layers.0.mlp.down_proj.weight"
    assert re.search(reason, problem.reason)
    assert problem.nearest == nearest


@st.composite
def formats(draw: st.DrawFn) -> str:
    grid = draw(
        st.sampled_from(["int2", "int3", "int4", "int6", "int8", "uint4", "uint8", "nf4", "e4m3", "e5m2", "e2m1"])
    )
    block = draw(st.sampled_from(["tensor", "channel", "g16", "g32", "g48", "g64", "g128", "g256", "128x128", "*x128"]))
    offset = draw(st.sampled_from(["", "", ":asym", ":zero=fp16", ":min=fp16"])) if "int" in grid else ""
    return f"{grid}:{block}{offset}"


@given(formats(), st.sampled_from(NAMES), st.sampled_from([96, 128, 256, 320, 576]), st.sampled_from([64, 192, 256]))
def test_the_nearest_format_is_held(fmt: str, name: str, width: int, rows: int) -> None:
    try:
        parse_format(fmt)
    except FormatError:
        return
    target = folder_exporter(name)
    for problem in target.check(model(layer("mlp.down_proj", fmt, None, (rows, width)))):
        assert target.check(model(layer("mlp.down_proj", problem.nearest, None, (rows, width)))) == []


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_one_layer_are_stored_alike(name: str) -> None:
    mixed = model(*(layer(part, "int4:g64" if "q_" in part else "int4:g32") for part in PARTS))
    found = folder_exporter(name).check(mixed)
    assert any("q_proj, k_proj, v_proj as one layer" in p.reason and p.nearest == "int4:g32" for p in found)
    kept = model(*(layer(part, None if "v_" in part else "int4:g32") for part in PARTS))
    (problem,) = folder_exporter(name).check(kept)
    assert problem.nearest == "keep"
    same = model(*(layer(part, "int4:g64" if part == "mlp.down_proj" else "int4:g32") for part in PARTS))
    assert (folder_exporter(name).check(same) == []) == (name != "awq")  # which has one group size


def test_where_one_part_is_not_for_a_block_the_others_follow() -> None:
    shapes = {"self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128)}
    found = folder_exporter("vllm").check(model(*(layer(n, "e4m3:128x128", None, s) for n, s in shapes.items())))
    assert {p.tensor.split(".")[-2] for p in found} == {"q_proj", "k_proj", "v_proj"}
    assert {p.nearest for p in found} == {"e4m3:channel"}
    assert all(p.shape for p in found)


def test_gptq_says_once_whether_there_are_zero_points() -> None:
    (problem,) = folder_exporter("gptq").check(
        model(layer("mlp.down_proj", "uint4:g32:asym"), layer("mlp.up_proj", "int4:g32"))
    )
    assert "no zero-points where other layers do" in problem.reason


@pytest.mark.parametrize("name", NAMES)
def test_stacks_that_transformers_saves_whole_are_refused(name: str) -> None:
    fmt = parse_format("int4:g32")
    odd = TensorPlan("mlp.experts.up", (4, 64, 64), "experts", torch.float32, False, fmt)
    (found,) = folder_exporter(name).check(model(layer("mlp.up_proj", "int4:g32"), odd))
    assert found.tensor == odd.name and "experts as one tensor" in found.reason
    conv = TensorPlan("h.0.c_fc.weight", (64, 64), "conv1d", torch.float32, True, fmt)
    assert folder_exporter(name).check(model(layer("mlp.up_proj", "int4:g32"), conv)) == []
