"""InputCapture: see the input of every weight while a model computes, whatever its architecture.

A torch function mode looks at each product. An operand that is a watched weight, or a view of one (`weight.T`,
`experts[3]`), is recognised by its memory; the other operand is the input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lowbit.blockwise.causal_attention import attention
from lowbit.blockwise.result_cache import ResultCache

# Called with (name of the weight, expert or None, input [..., K]); what it returns takes the input's place.
OnInput = Callable[[str, "int | None", Tensor], "Tensor | None"]
OnOutput = Callable[[str, "int | None", Tensor], None]

# Products: where the input stands and where the weight, among the positional arguments or by name.
PRODUCTS: dict[Callable[..., Any], tuple[tuple[int, str], tuple[int, str]]] = {
    F.linear: ((0, "input"), (1, "weight")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
    torch.baddbmm: ((1, "batch1"), (2, "batch2")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.bmm: ((0, "input"), (1, "mat2")),
    Tensor.matmul: ((0, "self"), (1, "other")),
    Tensor.__matmul__: ((0, "self"), (1, "other")),
    Tensor.mm: ((0, "self"), (1, "mat2")),
    Tensor.bmm: ((0, "self"), (1, "mat2")),
}


class InputCapture(TorchFunctionMode):
    """Watches `weights` (name -> parameter, 2-D or 3-D stacks of experts) and calls `on_input` at each product."""

    def __init__(
        self, weights: Mapping[str, Tensor], on_input: OnInput, on_output: OnOutput | None = None,
        results: ResultCache | None = None,
    ) -> None:  # fmt: skip
        """`on_output` is called with what each product gave. `results` answers for products and attention that it knows: the
        inputs of these are not seen."""
        super().__init__()
        self.on_input, self.on_output, self.results = on_input, on_output, results
        self.known = {w.untyped_storage().data_ptr(): (name, w) for name, w in weights.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        product, found = PRODUCTS.get(func), None
        if product is not None:
            (at, name), (weight_at, weight_name) = product
            weight = args[weight_at] if len(args) > weight_at else kwargs.get(weight_name)
            found = self._find(weight)
            if found is not None and self.results is not None:
                self.results.depends_on(found[0])
            if found is not None and not (self.results is not None and self.results.knows_next):
                x = args[at] if len(args) > at else kwargs[name]
                other = self._multiplied(*found, x)
                if len(args) > at:
                    args = (*args[:at], other, *args[at + 1 :])
                else:
                    kwargs[name] = other
        if func is F.scaled_dot_product_attention:
            func = attention
        if self.results is not None and (found is not None or func is attention):
            result = self.results.result(lambda: func(*args, **kwargs), costly=func is attention)
        else:
            result = func(*args, **kwargs)
        if found is not None and self.on_output is not None:
            self.on_output(*found, result)
        return result

    def _find(self, weight: Any) -> tuple[str, int | None] | None:
        if not isinstance(weight, Tensor) or weight.is_meta:
            return None
        known = self.known.get(weight.untyped_storage().data_ptr())
        if known is None:
            return None
        name, whole = known
        if whole.dim() < 3:
            return name, None
        if weight.dim() == 3:
            return name, -1  # a batched product of all experts at once
        return name, (weight.storage_offset() - whole.storage_offset()) // (whole.shape[1] * whole.shape[2])

    def _multiplied(self, name: str, expert: int | None, x: Tensor) -> Tensor:
        if expert == -1:
            parts = [self._replaced(name, e, part) for e, part in enumerate(x)]
            changed = any(new is not old for new, old in zip(parts, x))
            return torch.stack(parts) if changed else x
        return self._replaced(name, expert, x)

    def _replaced(self, name: str, expert: int | None, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            other = self.on_input(name, expert, x)
        return x if other is None else other
