"""Running a model that someone else wrote: where its input goes, how long it may be, which tokens it knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import TextError
from lowbit.interchange.hf.text_config import text_config


def device_of(model: nn.Module) -> torch.device:
    """The device that takes the model's input: that of its input embedding, else of its first tensor."""
    try:
        return model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr, return-value]
    except (AttributeError, NotImplementedError):
        pass  # a plain module, or an embedding that keeps packed buffers instead of a weight
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def max_positions(model: nn.Module) -> int | None:
    """The longest sequence that the model's positions cover, or None when it has no limit.

    From the config. RoBERTa and its kin start counting after the padding index, which costs them
    that many rows of their position table: seen in the table's own `padding_idx`.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    inner = text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(inner, name, None)
        if isinstance(limit, int) and limit > 0:
            break
    else:
        return None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        is_table = name.endswith("position_embeddings") and getattr(module, "num_embeddings", None) == limit
        if is_table and isinstance(padding, int):
            return limit - padding - 1
    return limit


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every submodule gets its own mode back at the end."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def fast_dtype() -> torch.dtype:
    """bfloat16 where this CPU multiplies it in hardware, about 4 times faster than float32; else float32."""
    able = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return torch.bfloat16 if any(getattr(torch.cpu, name, bool)() for name in able) else torch.float32


def check_vocabulary(model: nn.Module, ids: Tensor) -> None:
    """TextError when a token id has no row in the model's embedding: the tokenizer is another model's."""
    config: Any = getattr(model, "config", None)
    inner = text_config(config)
    size = getattr(inner, "vocab_size", None)
    if isinstance(size, int):
        check_ids(ids, size)


def check_ids(ids: Tensor, size: int) -> None:
    """TextError when one of `ids` is none of a vocabulary of `size`."""
    if int(ids.max()) >= size:
        raise TextError(
            f"the tokenizer gives token {int(ids.max())}, but the model has {size} tokens: "
            "use the tokenizer that belongs to the model"
        )
