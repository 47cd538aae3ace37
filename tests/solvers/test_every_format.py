"""What holds for every format, fit and solver: constants, zeros, empty and one-element tensors, same bits twice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError, LowbitError, RecipeError
from lowbit.formats import IntGrid, QTensor, encode, parse_format
from lowbit.solvers import Call, fit_blocks
from lowbit.solvers.registry import methods
from strategies import FIXED_GRIDS, normal, steady, weighing

GRIDS = [grid for grid in FIXED_GRIDS if grid != "int1"]
OFFSETS = ["asym", "zero=int32", "zero=fp32", "zero=fp16", "min=fp32", "min=fp16"]
FORMATS = [
    *(f"{grid}:g8" for grid in GRIDS),
    *(f"{grid}:g8:{offset}" for grid in ("int1", "uint3", "int8") for offset in OFFSETS),
    *("nf4-dq", "mxfp4", "mxfp8", "nvfp4", "q4_k", "int4:2x3", "int5:*x4", "int3:channel", "int8:tensor", "int6:narrow"),
    *(f"int4:g8:s={store}" for store in ("fp32", "bf16", "e8m0", "e4m3")),
    *(f"int4:g8:s={store}" for store in ("(uint8:g4)", "(uint8:g4:asym)", "(int5:g4:min=fp16)")),
    *("kmeans4:tensor", "kmeans3:channel", "kmeans2:g8", "kmeans4:g8:cb=tensor", "kmeans1:2x3:cb=tensor"),
]  # fmt: skip
# A block whose scale is kept as it is, not beside its neighbours.
OWN_SCALES = [text for text in FORMATS if isinstance(parse_format(text).scale, str) and "kmeans" not in text]
SHAPES = [(0,), (0, 5), (5, 0), (0, 4, 8), (3, 0, 8), (), (1,), (1, 1), (1, 1, 1), (7,), (5, 19), (2, 3, 17)]


def fits_of(text: str) -> list[str]:
    if text.startswith("kmeans"):
        return ["search", "mse", "absmax"]
    offset = parse_format(text).offset
    if offset is None:
        return ["absmax", "absmean", "symmetric", "mx", "mse", "search", "percentile"]
    return ["minmax", "mse", "search", "percentile", "hqq"]


def quantize(x: torch.Tensor, text: str, fit: str) -> QTensor:
    solver = "kmeans" if text.startswith("kmeans") else "rtn"
    return Call(solver)(x, parse_format(text), Call(fit), None)


def positive_only(text: str) -> bool:
    fmt = parse_format(text)
    return fmt.offset is None and isinstance(fmt.grid, IntGrid) and not fmt.grid.signed


@pytest.mark.parametrize("text", FORMATS)
def test_every_shape_gives_its_parts_and_finite_values(text):
    for fit in fits_of(text):
        for shape in SHAPES:
            x = normal(shape, 1)
            x = x.abs() if positive_only(text) else x
            q = quantize(x, text, fit)
            assert {k: (v.dtype, tuple(v.shape)) for k, v in q.parts().items()} == q.format.parts(shape)
            assert q.dequantize().shape == x.shape and bool(q.dequantize().isfinite().all())


@pytest.mark.parametrize("text", FORMATS)
def test_zero_blocks_are_exact(text):
    for fit in fits_of(text):
        x = normal((6, 24), 2)
        x = x.abs() if positive_only(text) else x
        x[1], x[2:4, 8:16] = 0, 0
        q = quantize(x, text, fit)
        if text in OWN_SCALES and parse_format(text).block.rows == 1:
            assert bool((q.dequantize()[1] == 0).all()), fit
        assert bool((quantize(torch.zeros(3, 16), text, fit).dequantize() == 0).all()), fit


@steady(60)
@given(
    st.sampled_from(OWN_SCALES),
    st.sampled_from([1.0, -1.0, 0.5, -3.0, 1.5, 0.1875, 96.0, -0.0234375, 448.0]),
    st.data(),
)
def test_constant_blocks_are_exact_where_the_stores_can_hold_them(text, value, data):
    fmt = parse_format(text)
    if positive_only(text):
        value = abs(value)
    if fmt.scale in ("e8m0", "e4m3"):
        value = 2.0 if value > 0 else -2.0
    x = normal((4, 24), 3).abs()
    rows = slice(None) if fmt.block.rows != 1 or fmt.block.cols == -1 else slice(1, 3)
    x[rows] = value
    q = quantize(x, text, data.draw(st.sampled_from(fits_of(text))))
    assert bool((q.dequantize()[rows] == value).all())


@pytest.mark.parametrize("value", [0.1, -0.3, 1e-3, -7.7])
@pytest.mark.parametrize("text", ["int4:channel", "nf4:channel", "iq4nl:channel", "ternary:channel", "e4m3:channel",
                                  "uint4:channel:asym", "int8:channel:zero=fp32", "uint2:channel:min=fp32"])  # fmt: skip
def test_a_float32_scale_makes_any_constant_exact(text, value):
    for fit in fits_of(text):
        assert bool((quantize(torch.full((2, 9), value), text, fit).dequantize() == torch.tensor(value)).all()), fit


@pytest.mark.parametrize(
    "text", ["q4_k", "uint4:g8:s=(uint8:g4):min=fp16", "iq4nl:g8:s=(uint8:g4)", "e2m1:g8:s=(e4m3:tensor)"]
)
def test_a_constant_block_does_not_crowd_its_neighbours(text):
    """A last group of one element is constant; its scale must not blow up the nested scale of the others."""
    x = normal((16, 32), 4) * 0.02
    x[::5, :8] = 0.05
    fit = fits_of(text)[0]
    without = x.clone()
    without[::5, :8] = normal((16, 8), 5)[::5] * 0.02
    rest = torch.ones(16, 32, dtype=torch.bool)
    rest[::5, :8] = False
    error, base = ((quantize(t, text, fit).dequantize() - t)[rest].norm() for t in (x, without))
    assert float(error) < 1.15 * float(base)


@pytest.mark.parametrize("text", FORMATS)
def test_same_weights_same_bytes(text):
    x = normal((6, 40), 6)
    x = x.abs() if positive_only(text) else x
    for fit in fits_of(text):
        first, second = (quantize(x.clone(), text, fit).parts() for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("text", ["int4:g8", "uint4:channel:asym", "kmeans3:channel", "nf4-dq", "kmeans4:g8:cb=tensor"])
def test_weights_are_not_changed_and_any_layout_is_read(text):
    x = normal((16, 24), 7)
    before = x.clone()
    fit = fits_of(text)[0]
    q = quantize(x, text, fit)
    assert torch.equal(x, before)
    strided = quantize(x.T.contiguous().T, text, fit)
    assert all(torch.equal(strided.parts()[k], v) for k, v in q.parts().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_read_as_float32(dtype):
    x = normal((8, 32), 8).to(dtype)
    for text in ("int4:g8", "uint4:g8:min=fp16", "kmeans3:channel"):
        a, b = quantize(x, text, fits_of(text)[0]), quantize(x.float(), text, fits_of(text)[0])
        assert all(torch.equal(a.parts()[k], v) for k, v in b.parts().items())


def test_chunks_do_not_change_the_result(monkeypatch):
    from lowbit.formats import blocks

    x = normal((16, 40), 9)
    cases = [(text, fit) for text in ("int4:g8", "uint4:g8:asym", "q4_k", "kmeans3:g8") for fit in fits_of(text)[:2]]
    whole = [quantize(x, text, fit) for text, fit in cases]
    monkeypatch.setattr(blocks, "CHUNK", 24)
    for (text, fit), expected in zip(cases, whole, strict=True):
        found = quantize(x, text, fit)
        assert all(torch.equal(found.parts()[k], v) for k, v in expected.parts().items())


def test_grids_without_a_side_are_errors():
    with pytest.raises(FormatError, match="no negative levels"):
        quantize(torch.tensor([[1.0, -1.0]]), "uint4:g8", "absmax")
    for fit in fits_of("int4:g8"):
        with pytest.raises(FormatError, match="no positive level"):
            quantize(torch.tensor([[1.0, -1.0]]), "int1:g8", fit)


def test_a_scale_that_does_not_fit_names_the_store():
    with pytest.raises(FormatError, match="does not fit fp16"):
        quantize(torch.full((1, 8), 1e7), "int4:g8", "absmax")


def test_fit_blocks_has_one_scale_a_block():
    fmt = parse_format("int4:2x3")
    scale, offset = fit_blocks(normal((2, 5, 7), 10), fmt, Call("absmax"))
    assert tuple(scale.shape) == (2, 3, 3) and offset is None
    scale, offset = fit_blocks(torch.zeros(0, 4), parse_format("int4:asym"), Call("minmax"))
    assert tuple(scale.shape) == tuple(offset.shape) == (1, 0, 1)


def test_importance_may_be_one_row():
    x, row = normal((6, 32), 11), normal((32,), 12).abs()
    for text, fit in (("int3:g8", "search"), ("uint3:g8:min=fp16", "search"), ("int3:g8", "mse")):
        a = Call("rtn")(x, parse_format(text), Call(fit), weighing(row))
        b = Call("rtn")(x, parse_format(text), Call(fit), weighing(row.expand(6, 32).contiguous()))
        assert torch.equal(a.dequantize(), b.dequantize())
        assert not torch.equal(a.dequantize(), quantize(x, text, fit).dequantize())


def test_registry_finds_every_method_and_its_options():
    fits, solvers = methods("fit"), methods("solver")
    assert {"absmax", "minmax", "symmetric", "percentile", "mse", "search", "hqq", "mx"} <= set(fits)
    assert {"rtn", "kmeans", "gptq", "gptaq", "qronos"} <= set(solvers)
    others = {name: m.kind for name, m in methods().items() if name not in fits and name not in solvers}
    # What rooms above announced, if they were imported.
    assert set(others.values()) <= {"transform", "weighting", "tuner"}
    assert all(m.summary for m in methods().values())
    assert methods()["percentile"].options == {"p": 99.9}
    assert list(methods()) == sorted(methods())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Call("absmaks"), "did you mean 'absmax'"),
        (lambda: Call("search", (("stepz", 4),)), "no option 'stepz'; did you mean 'steps'"),
        (lambda: Call("absmax", (("p", 4),)), "it has none"),
        (lambda: Call("percentile", (("p", "high"),)), "is a finite number"),
    ],
)
def test_unknown_methods_and_options_are_errors_that_name_the_nearest(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_a_call_prints_as_a_recipe_writes_it():
    assert str(Call("search", (("steps", 8), ("span", 0.5)))) == "search(span=0.5,steps=8)"
    assert Call("search", (("steps", 8), ("span", 0.5))) == Call("search", (("span", 0.5), ("steps", 8)))
    assert str(Call("rtn")) == "rtn"


def test_every_refusal_is_a_lowbit_error():
    """Any fit on any format either works or says why not."""
    for fit in methods("fit"):
        for text in FORMATS[::3]:
            try:
                q = quantize(normal((4, 16), 13), text, fit)
            except LowbitError:
                continue
            assert bool(q.dequantize().isfinite().all())


def test_encode_by_hand_for_a_codebook():
    fmt = parse_format("kmeans1:tensor")
    q = encode(torch.tensor([[-2.0, 0.4, 0.6, 5.0]]), fmt, levels=torch.tensor([0.0, 1.0]).view(1, 1, 1, 2))
    assert q.dequantize().tolist() == [[0.0, 0.0, 1.0, 1.0]]
