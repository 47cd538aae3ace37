"""Safetensors headers as hostile input, and reads that touch one tensor only."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lowbit.errors import SourceError
from lowbit.interchange.files.safetensors_reader import DTYPES, read_header, read_tensor, sampled


def write(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def f32(begin: int, end: int, *shape: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE = {
    "empty file": (None, b"", None, "too few"),
    "length beyond the file": ({}, b"", 50, "truncated"),
    "length beyond the limit": ({}, b"", 200_000_000, "more than"),
    "length beyond 63 bits": ({}, b"", 2**64 - 1, "more than"),
    "not JSON": (b"{nope", b"", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not valid JSON"),
    "nested without end": (b"[" * 100_000, b"", None, "not valid JSON"),
    "huge number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", None, "not valid JSON"),
    "not an object": ([1], b"", None, "not a JSON object"),
    "repeated tensor": (
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}',
        b"", None, "'a' twice",
    ),
    "repeated field": (
        b'{"a":{"dtype":"U8","dtype":"F32","shape":[0],"data_offsets":[0,0]}}', b"", None, "'dtype' twice"
    ),
    "metadata is a list": ({"__metadata__": [1]}, b"", None, "__metadata__"),
    "metadata holds a number": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__"),
    "tensor is a number": ({"a": 3}, b"", None, "'a'"),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [1]}}, b"", None, "'a'"),
    "unknown dtype": ({"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}, b"0000", None, "'Q9'"),
    "dtype is a list": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000", None, "dtype"),
    "negative size": ({"a": f32(0, 4, -1)}, b"0000", None, "shape"),
    "true as a size": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"0000", None, "shape"),
    "fractional size": ({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, b"0000", None, "shape"),
    "shape x dtype too small": ({"a": f32(0, 8, 1)}, b"0" * 8, None, "needs 4 bytes"),
    "shape x dtype overflows 64 bits": ({"a": f32(0, 4, 2**40, 2**40)}, b"0000", None, "bytes"),
    "offsets backwards": ({"a": f32(4, 0, 1)}, b"0000", None, "data_offsets"),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000", None, "data_offsets"
    ),
    "offsets overlap": ({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, b"0" * 12, None, "overlaps tensor 'a'"),
    "same range twice": ({"a": f32(0, 4, 1), "b": f32(0, 4, 1)}, b"0000", None, "overlaps"),
    "hole between": ({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, b"0" * 12, None, "belong to no tensor"),
    "hole at the start": ({"a": f32(4, 8, 1)}, b"0" * 8, None, "belong to no tensor"),
    "bytes after the last": ({"a": f32(0, 4, 1)}, b"0" * 6, None, "belong to no tensor"),
    "data cut short": ({"a": f32(0, 4, 1), "b": f32(4, 12, 2)}, b"0" * 9, None, "'b' ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_header_is_one_clear_error(case: str, tmp_path: Path) -> None:
    header, data, length, said = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    if header is None:
        path.write_bytes(data)
    else:
        write(path, header, data, length)
    with pytest.raises(SourceError) as caught:
        read_header(path)
    message = str(caught.value)
    assert said in message and str(path) in message and "\n" not in message
    assert message.count(";") >= 1  # says what to do


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"none\.safetensors"):
        read_header(tmp_path / "none.safetensors")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(noise)
    with contextlib.suppress(SourceError):
        assert read_header(path).file_bytes == len(noise)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255))
def test_a_damaged_byte_never_reads_outside_the_file(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "flip.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.int64)}, path)
    raw = bytearray(path.read_bytes())
    raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        header = read_header(path)
    except SourceError:
        return
    for entry in header.entries.values():
        assert entry.offset + entry.nbytes <= len(raw)
        try:
            tensor = read_tensor(path, entry)
        except SourceError:
            continue
        assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_reads_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    dtype, path = DTYPES[name], tmp_path / "t.safetensors"
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (5 * 3 * dtype.itemsize,), dtype=torch.uint8)
    want = {
        "x": raw.view(dtype).reshape(5, 3),
        "scalar": raw[: dtype.itemsize].clone().view(dtype).reshape(()),
    }
    want["empty"] = torch.empty((0, 7), dtype=dtype)
    save_file(want, path, metadata={"format": "pt"})
    header = read_header(path)
    assert dict(header.metadata) == {"format": "pt"} and header.file_bytes == path.stat().st_size
    for key, tensor in want.items():
        got = read_tensor(path, header.entries[key])
        assert got.dtype == dtype and got.shape == tensor.shape
        assert torch.equal(got.reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8))


@settings(max_examples=60, deadline=None)
@given(st.integers(-7, 7), st.integers(-7, 7), st.sampled_from([(5, 3), (1,), (0, 4), (4, 2, 3)]))
def test_rows_are_those_of_slicing(
    tmp_path_factory: pytest.TempPathFactory, first: int, last: int, shape: tuple[int, ...]
) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.safetensors"
    x = torch.randn(shape).to(torch.bfloat16)
    save_file({"before": torch.zeros(3), "x": x}, path)
    got = read_tensor(path, read_header(path).entries["x"], rows=slice(first, last))
    assert torch.equal(got, x[first:last])


def test_file_that_shrank_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": torch.ones(100)}, path)
    entry = read_header(path).entries["x"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)
    with pytest.raises(SourceError, match="ends inside tensor 'x'"):
        read_tensor(path, entry)


def test_bool_with_other_bytes_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t", {"x": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x07")
    with pytest.raises(SourceError, match="BOOL"):
        read_tensor(path, read_header(path).entries["x"])


def test_samples_differ_when_values_differ(tmp_path: Path) -> None:
    prints = set()
    for seed in range(3):
        save_file({"x": torch.randn(1000, generator=torch.Generator().manual_seed(seed))}, tmp_path / "t")
        prints.add((read_header(tmp_path / "t").sha256, sampled(tmp_path / "t")))
    assert len({header for header, _ in prints}) == 1 and len({values for _, values in prints}) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS")
def test_reading_one_tensor_needs_no_address_space_for_the_file(tmp_path: Path) -> None:
    """An 8 GiB file is read under a limit of 256 MiB above what the imports take."""
    path, big = tmp_path / "big.safetensors", 8 << 30
    header = {
        "big": {"dtype": "I8", "shape": [big >> 10, 1024], "data_offsets": [0, big]},
        "small": {"dtype": "U8", "shape": [4], "data_offsets": [big, big + 4]},
    }
    write(path, header)
    start = path.stat().st_size
    with path.open("r+b") as file:  # a sparse file: no disk is used
        file.truncate(start + big)
        file.seek(start + big)
        file.write(bytes([1, 2, 3, 4]))
    code = """
import resource, sys
from lowbit.interchange.files.safetensors_reader import read_header, read_tensor
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (256 << 20),) * 2)
header = read_header(sys.argv[1])
assert read_tensor(sys.argv[1], header.entries["small"]).tolist() == [1, 2, 3, 4]
assert read_tensor(sys.argv[1], header.entries["big"], rows=slice(-3, None)).shape == (3, 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
