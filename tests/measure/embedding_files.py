"""The files with which sentence-transformers makes an embedding model of a folder."""

from __future__ import annotations

import json
from pathlib import Path


def embedding_files(folder: Path, mode: str, *, normalize: bool = True) -> None:
    """Into a model's folder: modules.json and the config of its pooling."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    places = ["", "1_Pooling", "2_Normalize"]
    parts = [
        {"idx": i, "name": str(i), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, place) in enumerate(zip(kinds, places, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(parts))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"embedding_dimension": 32, "pooling_mode": mode}))
