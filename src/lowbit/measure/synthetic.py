"""Images and sounds that are made here, always the same ones, for models whose user gives none.

Noise is unlike anything that a model has learned: much of it looks alike to the model, and nothing has a class. So images have a ground whose colour
runs, with discs, bars and stripes on it, and sounds have tones with overtones, tones that glide, and pauses. They are no
photographs and no speech all the same; whoever has some measures with those.
"""

from __future__ import annotations

import numpy as np

RATE = 16000  # samples a second
_SECONDS = 2.0
_TONES = 6  # in a sound


def image(number: int, size: int = 256) -> np.ndarray:
    """uint8 [size, size, 3], another one for each number."""
    random = np.random.default_rng([7, number])
    y, x = np.mgrid[0:size, 0:size] / size
    angle = random.uniform(0, 2 * np.pi)
    along = (np.cos(angle) * x + np.sin(angle) * y)[..., None]
    picture = random.uniform(0.1, 0.9, 3) * (1 - along) + random.uniform(0.1, 0.9, 3) * along
    for _ in range(random.integers(2, 6)):
        where = _shape(x, y, random)[..., None]
        picture = picture * (1 - where) + random.uniform(0, 1, 3) * where
    picture = picture + random.normal(0, 0.02, picture.shape)  # as of a camera
    return (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)


def _shape(x: np.ndarray, y: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """How much of each place a shape covers, 0 to 1."""
    cx, cy, size = random.uniform(0.15, 0.85), random.uniform(0.15, 0.85), random.uniform(0.08, 0.3)
    angle = random.uniform(0, np.pi)
    u = np.cos(angle) * (x - cx) + np.sin(angle) * (y - cy)
    v = -np.sin(angle) * (x - cx) + np.cos(angle) * (y - cy)
    kind = random.integers(3)
    inside = (
        size - np.hypot(u, v) if kind == 0 else np.minimum(size - np.abs(u), size * random.uniform(0.2, 1) - np.abs(v))
    )
    covered = np.clip(inside * 100, 0, 1)
    return covered * (0.5 + 0.5 * np.sign(np.sin(u * random.uniform(40, 120)))) if kind == 2 else covered


def sound(number: int) -> np.ndarray:
    """float32 [samples] of `RATE`, between -1 and 1, another one for each number."""
    random = np.random.default_rng([11, number])
    out = np.zeros(int(_SECONDS * RATE))
    edges = np.sort(random.uniform(0, len(out), 2 * _TONES)).astype(int).reshape(-1, 2)
    for start, end in edges:
        time = np.arange(end - start) / RATE
        low, high = random.uniform(90, 400, 2)
        pitch = low + (high - low) * time / max(time[-1] if len(time) else 1.0, 1e-6)
        phase = 2 * np.pi * np.cumsum(pitch) / RATE
        tone = sum(np.sin(k * phase + random.uniform(0, 6)) * random.uniform(0.2, 1) / k for k in range(1, 9))
        rise = np.minimum(1.0, np.minimum(np.arange(len(time)), np.arange(len(time))[::-1]) / 400)
        out[start:end] += tone * rise * random.uniform(0.3, 1)
    out += random.normal(0, 0.003, len(out))
    return (0.6 * out / np.abs(out).max()).astype(np.float32)


def spectrum(number: int, bins: int, frames: int) -> np.ndarray:
    """float32 [bins, frames]: such a sound as bands of energy on a log scale, for a model whose own bands are not known. About -1 to 1."""
    random = np.random.default_rng([13, number])
    time, band = np.arange(frames)[None, :] / max(1, frames), np.arange(bins)[:, None] / max(1, bins)
    out = np.full((bins, frames), -1.0)
    for _ in range(_TONES):
        start, length = random.uniform(0, 0.8), random.uniform(0.05, 0.3)
        pitch = random.uniform(0.05, 0.2) + random.uniform(-0.1, 0.1) * (time - start)
        for k in range(1, 5):
            line = np.exp(-(((band - k * pitch) / 0.02) ** 2)) * 2 / k
            out = np.maximum(out, -1 + line * ((time > start) & (time < start + length)))
    return (out + random.normal(0, 0.02, out.shape)).astype(np.float32)
