"""What an engine is opened from: a folder, a live model, or any name that lowbit takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.engine.expected_shapes import check_model_shapes
from lowbit.engine.shape import known
from lowbit.engine.tokenizer import AnyTokenizer, TextTokenizer, tokenizer_of
from lowbit.engine.weights import FolderWeights, ModelWeights, SourceWeights, Weights
from lowbit.errors import EngineError, SourceError
from lowbit.interchange.checks.config import check_decoder, lacks
from lowbit.interchange.end_tokens import end_tokens
from lowbit.interchange.files.settings import OURS, generation_of, quantized_by, read_config
from lowbit.interchange.files.weights import remarks_on
from lowbit.interchange.source import Source, say_remarks

Opened = tuple[Weights, TextTokenizer | None, frozenset[int]]


def opened(model: str | Path | nn.Module | Source, tokenizer: Any = None) -> Opened:
    """(weights, tokenizer, the tokens that end a text). EngineError for a model that the engine cannot run."""
    if isinstance(model, nn.Module):
        return _of_model(model, tokenizer)
    if isinstance(model, Source):
        return _of_source(model, tokenizer)
    path = Path(model)
    if path.is_dir() and quantized_by(path) in (None, OURS):
        return _of_folder(path, tokenizer)
    from lowbit.interchange.opening import open_source

    return _of_source(open_source(str(model), tokenizer=tokenizer), tokenizer)


def _of_folder(folder: Path, tokenizer: Any) -> Opened:
    config = read_config(folder)
    refuse(config)
    say_remarks(str(folder), remarks_on(folder))
    if _major(config.get("transformers_version")) < 5 or lacks(config):
        # What older versions left out are defaults that only its class knows; importing that takes a second.
        config = _normalized(folder)
    check_decoder(config, str(folder / "config.json"))
    weights = FolderWeights(folder, config)
    check_model_shapes(weights.shapes(), config, str(folder))
    words = tokenizer_of(folder) if tokenizer is None else _given(tokenizer)
    return weights, words, end_tokens(generation_of(folder), config, words)


def _of_model(model: nn.Module, tokenizer: Any) -> Opened:
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        raise EngineError(f"a {type(model).__name__} has no transformers config, by which the engine knows a model")
    weights = ModelWeights(model)
    refuse(weights.config)
    words: TextTokenizer | None = None
    folder = Path(str(getattr(config, "_name_or_path", "") or "."))
    if tokenizer is not None:
        words = _given(tokenizer)
    elif (folder / "tokenizer.json").is_file() and (folder / "config.json").is_file():
        words = tokenizer_of(folder)
    generation = getattr(model, "generation_config", None)
    return weights, words, end_tokens(generation.to_dict() if generation is not None else {}, weights.config, words)


def _of_source(source: Source, tokenizer: Any) -> Opened:
    weights = SourceWeights(source)
    refuse(weights.config)
    words: TextTokenizer | None
    try:
        words = AnyTokenizer(source.tokenizer()) if tokenizer is None else _given(tokenizer)
    except SourceError:
        words = None
    return weights, words, source.end_tokens()


def refuse(config: Mapping[str, Any]) -> None:
    """EngineError for a model whose type or purpose the engine does not know, before anything large is read."""
    known(config)
    classes = config.get("architectures") or []
    if classes and not any(str(c).endswith("ForCausalLM") for c in classes):
        raise EngineError(f"the engine generates text, and this is a {classes[0]}")


def _given(tokenizer: Any) -> TextTokenizer:
    return tokenizer if isinstance(tokenizer, TextTokenizer) else AnyTokenizer(tokenizer)


def _major(version: Any) -> int:
    """Of a version such as 5.24.0; 0 where it says none."""
    first = str(version).partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _normalized(folder: Path) -> dict[str, Any]:
    from lowbit.interchange.hf.loading import load_config

    # Through JSON, so that what is not plain data is found here.
    found: dict[str, Any] = json.loads(json.dumps(load_config(folder).to_dict(), default=str))
    return found
