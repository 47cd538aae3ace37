"""Inputs of the user: images, sounds and arrays, and what is no input."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lowbit.errors import TextError
from lowbit.measure.given_inputs import given_inputs, read_sound, resampled
from lowbit.measure.synthetic import image, sound, spectrum


def write_wave(file: Path, values: np.ndarray, width: int, rate: int = 8000) -> Path:
    """values int64 [samples, channels] in the range of the width."""
    raw = (values + 128).astype("u1") if width == 1 else values.astype("<i4")
    with wave.open(str(file), "wb") as out:
        out.setnchannels(values.shape[1])
        out.setsampwidth(width)
        out.setframerate(rate)
        data = raw.tobytes() if width == 1 else raw.astype("<i4").view("u1").reshape(-1, 4)[:, :width].tobytes()
        out.writeframes(data)
    return file


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_sounds_of_every_width(width: int, tmp_path: Path) -> None:
    full = 2 ** (8 * width - 1)
    random = np.random.default_rng(0)
    values = random.integers(-full, full, (50, 2))
    found, rate = read_sound(write_wave(tmp_path / "a.wav", values, width))
    assert rate == 8000 and found.dtype == np.float32
    assert found == pytest.approx((values / full).mean(1), abs=1e-6)


def test_another_rate_keeps_the_tone() -> None:
    """A sine of a whole number of periods, whose values at the new places are known."""
    n, wanted = 800, 1600
    tone = np.sin(2 * np.pi * 20 * np.arange(n) / n)
    assert resampled(tone, 8000, 16000) == pytest.approx(np.sin(2 * np.pi * 20 * np.arange(wanted) / wanted), abs=1e-6)
    assert resampled(tone, 16000, 8000) == pytest.approx(tone[::2], abs=1e-6)
    assert resampled(tone, 8000, 8000) is tone


def test_images_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    pillow: Any = pytest.importorskip("PIL.Image")
    for name, shade in (("b.png", 200), ("a.png", 10), (".hidden.png", 0)):
        pillow.new("L", (6, 4), shade).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no input")
    given = given_inputs(tmp_path)
    assert given.count == 2 and given.first(2) == f"2 images of {tmp_path.name}" and given.image is not None
    assert given.image(0).shape == (4, 6, 3) and given.image(0).max() == 10 and given.image(1).min() == 200
    assert given_inputs(tmp_path / "a.png").count == 1


def test_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixel_values=np.ones((3, 4, 4), np.float32))
    given = given_inputs(tmp_path / "x.npz")
    assert given.ready is not None and given.ready(0)["pixel_values"].shape == (3, 4, 4)
    given = given_inputs([{"input_values": [0.5, 1.0]}, {"input_values": torch.zeros(1, 3)}])
    assert given.count == 2 and given.ready is not None and given.ready(1)["input_values"].shape == (1, 3)


def test_what_is_no_input(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no file or folder"):
        given_inputs(tmp_path / "nothing")
    with pytest.raises(TextError, match="holds no inputs; they are images"):
        given_inputs(tmp_path)
    for name in ("a.png", "a.wav", "a.npz"):
        (tmp_path / name).write_bytes(b"RIFF\x00\x00 damaged")
        given = given_inputs(tmp_path / name)
        read: Any = given.image or given.sound or given.ready
        with pytest.raises(TextError, match=f"{name}: cannot be read|Pillow"):
            read(0)
    with pytest.raises(TextError, match="side by side"):
        given_inputs(tmp_path)
    for wrong in (7, [], [3], [{}]):
        with pytest.raises(TextError, match="a list of what the model is called with"):
            given_inputs(wrong)
    given = given_inputs([{"x": [float("nan")]}])
    assert given.ready is not None
    with pytest.raises(TextError, match="not finite"):
        given.ready(0)


def test_objects_in_arrays_are_not_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", pixel_values=np.array([{"a": 1}], dtype=object))
    given = given_inputs(tmp_path / "x.npz")
    assert given.ready is not None
    with pytest.raises(TextError, match="cannot be read as arrays"):
        given.ready(0)


def test_what_is_made_here_is_always_the_same_and_never_alike() -> None:
    pictures, sounds, bands = ([make(i) for i in range(3)] for make in (image, sound, lambda i: spectrum(i, 20, 50)))
    assert all(np.array_equal(a, b) for a, b in zip(pictures, map(image, range(3)), strict=True))
    for group in (pictures, sounds, bands):
        assert all(not np.array_equal(group[0], other) for other in group[1:])
    assert pictures[0].dtype == np.uint8 and pictures[0].shape == (256, 256, 3) and pictures[0].std() > 10
    assert np.abs(sounds[0]).max() <= 1 and sounds[0].dtype == np.float32
    # Neighbours of an image and of a sound are alike, which those of noise are not.
    grey = pictures[0].astype(float).mean(2)
    assert np.corrcoef(grey[:, 1:].ravel(), grey[:, :-1].ravel())[0, 1] > 0.9
    assert np.corrcoef(sounds[0][1:], sounds[0][:-1])[0, 1] > 0.8
