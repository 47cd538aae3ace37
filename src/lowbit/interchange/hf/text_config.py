"""The config of the part of a model that has to do with text."""

from __future__ import annotations

from typing import Any


def text_config(config: Any, decoder: bool = False) -> Any:
    """What `config` has inside for the part that reads text, or, with `decoder`, for the one that writes it; itself where it has no parts.

    Where several parts read text, such as the encoder and the decoder of a model that makes music of words, it is the one that writes.
    """
    if not hasattr(config, "get_text_config"):
        return config
    for options in ({"decoder": True} if decoder else {}, {"decoder": True}):
        try:
            return config.get_text_config(**options)
        except ValueError:  # transformers finds several
            continue
    return config
