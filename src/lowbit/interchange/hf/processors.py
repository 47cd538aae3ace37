"""What turns an image or a sound into what a model reads: the processors of its folder, without code from the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_FILES = ("preprocessor_config.json", "processor_config.json")


def image_processor(folder: Path | None) -> Any | None:
    """The image processor of a folder; None where it has none, or none that runs here."""
    return _loaded("AutoImageProcessor", folder, "image_mean", backend="pil")


def feature_extractor(folder: Path | None) -> Any | None:
    """What makes features of sounds, as `image_processor`."""
    return _loaded("AutoFeatureExtractor", folder, "sampling_rate")


def _loaded(auto: str, folder: Path | None, mark: str, **options: Any) -> Any | None:
    """mark: an attribute that a processor of that kind has."""
    import transformers

    if folder is None or not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        found = getattr(transformers, auto).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception:  # of the other kind, or of a library that is not here: the plain way does
        return None
    return found if hasattr(found, mark) else None


def processed(processor: Any, value: np.ndarray, **options: Any) -> dict[str, Tensor]:
    """What a processor makes of one image (uint8 [height, width, 3]) or one sound (float32 [samples])."""
    found: Mapping[str, Any] = processor(value, return_tensors="pt", **options)
    return {name: torch.as_tensor(x) for name, x in found.items()}
