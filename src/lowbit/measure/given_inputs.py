"""Inputs that a user gives: images, sounds, and arrays that are what a model is called with. Read one at a time; nothing in them is run."""

from __future__ import annotations

import warnings
import wave
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import TextError

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
_SOUNDS = (".wav",)
_ARRAYS = (".npz",)
KNOWN = "images (.png, .jpg and others that Pillow reads), sounds (.wav) and arrays by the names of the model's arguments (.npz)"
_MOST_FILES, _LARGEST = 10_000, 1 << 30  # bytes
_WIDTHS: Mapping[int, tuple[Any, float, float]] = {
    1: ("u1", 128.0, 128.0),
    2: ("<i2", 0.0, 32768.0),
    4: ("<i4", 0.0, 2147483648.0),
}


@dataclass(frozen=True)
class Given:
    """Files of one kind in the order of their names, or arrays. name: for the card. image gives uint8 [height, width, 3], sound float32
    [samples] and samples a second, ready what a model is called with: each None where there are none of the kind."""

    name: str
    count: int
    image: Callable[[int], np.ndarray] | None = None
    sound: Callable[[int], tuple[np.ndarray, int]] | None = None
    ready: Callable[[int], dict[str, Tensor]] | None = None

    def first(self, count: int) -> str:
        """'12 images of my-photos', 'the first 8 of 12 images of my-photos'."""
        what = "image" if self.image is not None else "sound" if self.sound is not None else "input"
        part = "" if count == self.count else f"the first {count} of "
        return f"{part}{self.count} {what}{'s' * (self.count != 1)} of {self.name}"


def given_inputs(source: Any) -> Given:
    """A folder or a file of inputs, or mappings of names of arguments to arrays. TextError for what is none of these, and for files of
    several kinds.

    Arrays of an input may have the dimension of 1 of a batch in front, or lack it.
    """
    if not isinstance(source, (str, Path)):
        return _of_mappings(source)
    path = Path(source)
    try:
        files = sorted(f for f in path.iterdir() if _kind(f)) if path.is_dir() else [path] if path.is_file() else []
    except OSError as error:
        raise TextError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not path.exists():
        raise TextError(f"no file or folder {str(path)!r} is here; inputs are {KNOWN}")
    if not files or not all(map(_kind, files)):
        raise TextError(f"{path} holds no inputs; they are {KNOWN}")
    if len(files) > _MOST_FILES:
        raise TextError(f"{path} has {len(files):,} inputs, more than the {_MOST_FILES:,} that are read; give fewer")
    kinds = {_kind(f) for f in files}
    if len(kinds) > 1:
        raise TextError(
            f"{path} has {' and '.join(sorted(map(str, kinds)))} side by side; put each kind into a folder of its own"
        )
    readers: dict[str, Callable[[Path], Any]] = {"image": read_image, "sound": read_sound, "ready": read_arrays}
    what = str(kinds.pop())
    return Given(path.resolve().name, len(files), **{what: lambda i: readers[what](files[i])})


def _kind(file: Path) -> str | None:
    known = (("image", _IMAGES), ("sound", _SOUNDS), ("ready", _ARRAYS))
    return next((kind for kind, ends in known if file.suffix.lower() in ends and not file.name.startswith(".")), None)


def _of_mappings(source: Any) -> Given:
    items = [source] if isinstance(source, Mapping) else list(source) if isinstance(source, Iterable) else []
    if not items or not all(isinstance(item, Mapping) and item for item in items):
        raise TextError(
            "inputs are a folder or a file, or a list of what the model is called with, each a mapping from the names of its arguments to arrays"
        )
    return Given("a list", len(items), ready=lambda i: {str(k): _tensor(v, str(k)) for k, v in items[i].items()})


def _tensor(value: Any, name: str) -> Tensor:
    try:
        found = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TextError(f"input {name!r} is no array of numbers") from None
    if not found.numel() or (found.is_floating_point() and not bool(torch.isfinite(found).all())):
        raise TextError(f"input {name!r} is empty, or has a value that is not finite")
    return found


def read_image(file: Path) -> np.ndarray:
    """uint8 [height, width, 3]. TextError."""
    try:
        from PIL import Image
    except ImportError:
        raise TextError(f"{file.name} is an image, which Pillow reads: pip install pillow") from None
    try:
        with warnings.catch_warnings(), Image.open(file) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except Exception as error:  # decoders raise many kinds for damaged files
        raise TextError(f"{file}: cannot be read as an image ({str(error)[:80] or type(error).__name__})") from None


def read_sound(file: Path) -> tuple[np.ndarray, int]:
    """float32 [samples] between -1 and 1, channels averaged, and samples a second. TextError."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        with wave.open(str(file)) as sound:
            width, channels, rate = sound.getsampwidth(), sound.getnchannels(), sound.getframerate()
            raw = sound.readframes(sound.getnframes())
        if width == 3:  # as the upper bytes of 32 bits
            packed = np.frombuffer(raw[: len(raw) // 3 * 3], "u1").reshape(-1, 3)
            raw, width = np.concatenate([np.zeros((len(packed), 1), "u1"), packed], axis=1).tobytes(), 4
        kind, zero, full = _WIDTHS[width]
        values = (np.frombuffer(raw[: len(raw) // width * width], kind).astype(np.float32) - zero) / full
        values = values[: len(values) // channels * channels].reshape(-1, channels).mean(1)
        if len(values) < 16 or not 1000 <= rate <= 768000:
            raise ValueError(f"it has {len(values)} samples at {rate} a second")
    except (OSError, EOFError, ValueError, KeyError, wave.Error) as error:
        raise TextError(f"{file}: cannot be read as a sound ({str(error)[:80]}); save it as WAV of 16 bits") from None
    return values.astype(np.float32), rate


def read_arrays(file: Path) -> dict[str, Tensor]:
    """Arrays by name, without pickled objects. TextError."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
    except Exception as error:  # zip, zlib and numpy raise many kinds for damaged files
        raise TextError(f"{file}: cannot be read as arrays ({str(error)[:80] or type(error).__name__})") from None
    if not found:
        raise TextError(f"{file} has no array; save one by the name of each argument of the model")
    return {name: _tensor(value, name) for name, value in found.items()}


def resampled(values: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """[samples] at another number of samples a second: the same spectrum, cut where it does not fit (band-limited, by FFT)."""
    if rate == wanted:
        return values
    count = max(1, round(len(values) * wanted / rate))
    spectrum = np.fft.rfft(values)[: count // 2 + 1]
    padded = np.zeros(count // 2 + 1, spectrum.dtype)
    padded[: len(spectrum)] = spectrum
    return (np.fft.irfft(padded, count) * (count / len(values))).astype(np.float32)
