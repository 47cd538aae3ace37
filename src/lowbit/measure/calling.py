"""One call of a model that somebody else wrote, with inputs that were made for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SourceError
from lowbit.interchange.hf.running import device_of, evaluating

_NAMES = ("logits", "last_hidden_state", "image_embeds")  # looked for in this order
_PROMPT = 8  # tokens that may stand before what is written, such as a language and a task
_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, NotImplementedError, AssertionError)


def called(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float tensors that a model gives for one input, by name, the one that counts most first. SourceError when it does not take
    the input, or gives none."""
    given = _placed(model, example)
    try:
        with evaluating(model):
            out = model(**given)
    except _REFUSALS as error:
        raise _refused(model, example, error) from None
    if isinstance(out, Tensor):
        return {"output": out}
    values = {k: x for k, x in out.items() if isinstance(x, Tensor) and x.is_floating_point()}
    name = next((n for n in (*_NAMES, *values) if n in values), None)
    if name is None:
        raise SourceError(f"{type(model).__name__} gives no numbers to compare")
    return {name: values[name], **values}


def written(model: nn.Module, example: Mapping[str, Tensor], new: int) -> list[int]:
    """The tokens that a model writes of one input, the most likely each time, `new` at most. SourceError as of `called`."""
    given = {name: x for name, x in _placed(model, example).items() if not name.startswith("decoder_")}
    config: Any = getattr(model, "config", None)
    room = getattr(config, "max_target_positions", None)  # of a decoder that counts its own
    if isinstance(room, int):
        new = max(1, min(new, room - _PROMPT))
    write: Any = model.generate
    try:
        with evaluating(model):
            found = write(**given, do_sample=False, num_beams=1, max_new_tokens=new)
    except _REFUSALS as error:
        raise _refused(model, given, error) from None
    ids = found if isinstance(found, Tensor) else found.sequences
    return [int(i) for i in ids[0]]


def _placed(model: nn.Module, example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the model's device, numbers in the model's type."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = device_of(model)
    return {name: x.to(device, own if x.is_floating_point() else x.dtype) for name, x in example.items()}


def _refused(model: nn.Module, example: Mapping[str, Tensor], error: Exception) -> SourceError:
    reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    return SourceError(f"{type(model).__name__} does not take {', '.join(example)} as made from its config ({reason})")
