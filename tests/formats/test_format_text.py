"""The text of a format reads back as the same format, and errors show the position."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.errors import FormatError
from lowbit.formats import (
    CHANNEL,
    NAMED,
    TENSOR,
    Block,
    CodebookGrid,
    Format,
    IntGrid,
    Offset,
    parse_format,
    parse_grid,
)
from strategies import formats, steady


@steady(400)
@given(formats())
def test_text_round_trip(fmt):
    text = str(fmt)
    again = parse_format(text)
    assert again == fmt and hash(again) == hash(fmt) and str(again) == text


@steady(300)
@given(formats(), st.data())
def test_broken_text_is_a_format_error_and_nothing_else(fmt, data):
    text = str(fmt)
    at = data.draw(st.integers(0, len(text)))
    junk = data.draw(
        st.sampled_from(["", ":", "(", ")", "=", "x", "-", "²", "٣", "é", " ", "g", "s=", "::", "0", "\n"])
    )
    broken = text[:at] + junk + text[at + data.draw(st.integers(0, 2)) :]
    try:
        found = parse_format(broken)
    except FormatError:
        return
    assert parse_format(str(found)) == found


@pytest.mark.parametrize(
    ("text", "fmt"),
    [
        ("int4", Format(parse_grid("int4"), CHANNEL, "fp32")),
        ("int4:g64", Format(parse_grid("int4"), Block(1, 64), "fp16")),
        ("int8:tensor:sym", Format(parse_grid("int8"), TENSOR, "fp32")),
        ("int8:token", Format(parse_grid("int8"), CHANNEL, "fp32")),
        ("int4:g128:asym", Format(parse_grid("int4"), Block(1, 128), "fp16", Offset("zero", "grid"))),
        ("int8:narrow", Format(IntGrid(8, narrow=True), CHANNEL, "fp32")),
        ("uint8:zero=int32", Format(parse_grid("uint8"), CHANNEL, "fp32", Offset("zero", "int32"))),
        ("uint4:g32:zero=bf16", Format(parse_grid("uint4"), Block(1, 32), "fp16", Offset("float", "bf16"))),
        ("fp8:128x128", Format(parse_grid("e4m3"), Block(128, 128), "fp16")),
        ("int8:*x128", Format(parse_grid("int8"), Block(-1, 128), "fp32")),
        ("mxfp4", Format(parse_grid("e2m1"), Block(1, 32), "e8m0")),
        ("mxfp4:s=fp16", Format(parse_grid("e2m1"), Block(1, 32), "fp16")),
        ("nvfp4", Format(parse_grid("e2m1"), Block(1, 16), Format(parse_grid("e4m3"), TENSOR, "fp32"))),
        ("kmeans4:channel", Format(CodebookGrid(4), CHANNEL, None, None, CHANNEL)),
        ("kmeans3:g32:cb=tensor:l=fp32", Format(CodebookGrid(3), Block(1, 32), "fp16", None, TENSOR, "fp32")),
        (
            "q4_k",
            Format(
                parse_grid("uint4"),
                Block(1, 32),
                Format(parse_grid("uint6"), Block(1, 8), "fp16"),
                Offset("min", Format(parse_grid("uint6"), Block(1, 8), "fp16")),
            ),
        ),
    ],
)
def test_known_texts(text, fmt):
    assert parse_format(text) == fmt


@pytest.mark.parametrize("name", NAMED)
def test_named_formats_mean_their_text(name):
    assert parse_format(name) == parse_format(NAMED[name])
    assert parse_format(str(parse_format(name))) == parse_format(name)


def test_standards_print_as_their_names():
    assert [str(parse_format(n)) for n in ("mxfp4", "mxfp8", "nvfp4")] == ["mxfp4", "mxfp8", "nvfp4"]
    assert str(parse_format("int8:channel:s=fp32:sym")) == "int8:channel"


@pytest.mark.parametrize(
    ("text", "position", "words"),
    [
        ("in4:g32", 1, "unknown grid 'in4'"),
        ("", 1, "unknown grid"),
        ("int4:g", 6, "unknown option 'g'"),
        ("int4:g32:asim", 10, "did you mean 'asym'"),
        ("int4:g32:g64", 10, "second block"),
        ("int4:s=fp17", 6, "not one of"),
        ("int4:g32:s=fp16:s=fp32", 17, "twice"),
        ("int4:asym:zero=fp32", 11, "exclude"),
        ("int4:g32:s=(uint8:g256", 12, "never closed"),
        ("int4:g32)", 9, "without its"),
        ("uint4:g32:s=(int6:gx)", 19, "unknown option 'gx'"),
        ("uint4:g32:min=(int6:gx)", 21, "unknown option 'gx'"),
        ("uint4:g32:min=(int6:s=(int5:g4:asim))", 32, "unknown option 'asim'"),
        ("int4:cb=tensor", 6, "learned codebooks"),
        ("kmeans4:g32:s=fp16", 13, "has no scale"),
        ("kmeans4:g32:cb=teapot", 13, "names no block"),
        ("int4:s=" + "(int4:s=" * 9 + ")" * 9, 40, "nested more than"),
    ],
)
def test_errors_show_the_position(text, position, words):
    with pytest.raises(FormatError) as caught:
        parse_format(text)
    message = str(caught.value)
    assert f"at position {position}:" in message and words in message
    *_, shown, caret = message.split("\n")
    assert shown == f"  {text}" and caret == " " * (position + 1) + "^"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: parse_format("int4:g0"), "at least 1 wide"),
        (lambda: parse_format("nf4:narrow"), "narrow"),
        (lambda: parse_format("nf4:asym"), "integer grid"),
        (lambda: parse_format("int4:s=(kmeans4:g8)"), "cannot have a learned codebook"),
        (lambda: parse_format("int4:zero=(int8:g8)"), "only a minimum can have a nested format"),
        (lambda: Format(parse_grid("int4"), CHANNEL, None), "needs a scale"),
        (lambda: Format(parse_grid("int4"), CHANNEL, "fp16", None, CHANNEL), "go together"),
        (lambda: Format(CodebookGrid(4), CHANNEL, "fp16"), "go together"),
        (lambda: Format(CodebookGrid(4), CHANNEL, None, None, TENSOR), "real values"),
        (lambda: Format(CodebookGrid(4), CHANNEL, None, None, CHANNEL, "e4m3"), "learned level"),
        (lambda: Format(parse_grid("int4"), CHANNEL, "fp16", levels_store="fp32"), "stores no levels"),
        (lambda: Format(parse_grid("int4"), CHANNEL, "int32"), "scale"),
        (lambda: Offset("zero", "fp16"), "zero-point"),
        (lambda: Offset("float", "e8m0"), "float offset"),
    ],
)
def test_formats_that_mean_nothing_are_errors(make, words):
    with pytest.raises(FormatError, match=words):
        make()
