"""The config and the tokenizer of a folder, as transformers reads them, without code from the folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit.errors import SourceError
from lowbit.interchange.checks.words import check_tokenizer
from lowbit.interchange.files.settings import read_config, read_json
from lowbit.interchange.hf.calls import asking, one_line
from lowbit.interchange.hf.text_config import text_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_config(folder: Path, **options: Any) -> PretrainedConfig:
    """The transformers config of a folder, never running code from it. SourceError when transformers refuses."""
    from transformers import AutoConfig, PretrainedConfig

    if "gguf_file" not in options:
        read_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
        if not isinstance(text_config(config), PretrainedConfig):  # an object that the class knows nothing of
            raise TypeError(f"a {type(config).__name__} has no config of a text model inside it")
        return config
    except Exception as error:  # transformers raises many kinds for a bad config
        raise SourceError(
            f"{folder / options.get('gguf_file', '')}: transformers cannot use this config ({one_line(error)}); a model type that needs code from its "
            "folder is not supported, and a newer transformers may know a new one"
        ) from error


def load_tokenizer(folder: Path, label: str, **options: Any) -> Any:
    """The tokenizer of a folder. SourceError when there is none or it needs code from the folder."""
    from transformers import AutoTokenizer

    file = folder / "tokenizer_config.json"
    if "gguf_file" not in options and file.is_file():
        check_tokenizer(read_json(file), str(file))
    with asking(
        "transformers", label, "load a tokenizer from it", "put tokenizer.json into the folder or pass tokenizer=..."
    ):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **options)
