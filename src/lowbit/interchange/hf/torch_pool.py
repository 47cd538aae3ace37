"""PyTorch's threads in a child of a process that forked."""

from __future__ import annotations

import torch


def settle_torch_pool() -> None:
    """Make PyTorch take new threads now where this process is a fork of one that had some.

    It does so by itself when it is next asked for its pool, but two threads that ask at once find none ("pool INTERNAL ASSERT
    FAILED"). Transformers reads weights in several threads, so this comes first, from one.
    """
    torch.set_num_threads(torch.get_num_threads())
