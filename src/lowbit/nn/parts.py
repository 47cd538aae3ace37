"""Parts: stored tensors as the buffers of a module, which no cast changes."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Parts(nn.Module):
    """Stored tensors as buffers; a dotted name becomes a child, so that names in files stay as they are."""

    def set_parts(self, parts: dict[str, Tensor]) -> None:
        """Register `parts` (names as in `QTensor.parts()`)."""
        nested: dict[str, dict[str, Tensor]] = {}
        for name, tensor in parts.items():
            head, dot, rest = name.partition(".")
            if dot:
                nested.setdefault(head, {})[rest] = tensor
            else:
                self.register_buffer(name, tensor)
        for name, inner in nested.items():
            child = Parts()
            child.set_parts(inner)
            self.add_module(name, child)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Parts:
        """Move between devices, but never change the type of a stored part: they are the weight."""

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)
