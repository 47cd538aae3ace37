"""Bounds on what transformers builds from a config, whichever field of it is wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.nn.modules import module as torch_module

# A model has more parameters than its checkpoint has tensors where a tensor holds several of them stacked, or as one.
_TIMES, _MORE = 16, 1024


@contextmanager
def no_more_than(tensors: int | None) -> Iterator[None]:
    """Building a module in this thread ends with a ValueError where it has many times the parts that `tensors` can fill.

    None: no bound. PyTorch tells of each parameter and module as it is registered, so neither time nor memory grow.
    """
    if tensors is None:
        yield
        return
    most, mine, seen = _TIMES * tensors + _MORE, threading.get_ident(), 0

    def count(owner: Any, name: str, part: Any) -> None:
        nonlocal seen
        if threading.get_ident() != mine or part is None:
            return
        seen += 1
        if seen > 4 * most:  # a parameter comes with the module that owns it, and those around it
            raise ValueError(f"it has more than {most} parts, and the weights have {tensors} tensors")

    hooks = (
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_module_registration_hook(count),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
