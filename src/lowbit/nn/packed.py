"""PackedWeight: a quantized weight that stands where a parameter stood.

It is a module, so its parts are buffers named `weight.codes`, `weight.scale`, ... that `.to()`,
`state_dict()` and the meta device treat by PyTorch's own rules. An empty parameter beside them, which is never saved, has the
type and the device by which code that asks `next(model.parameters())` knows where and in what a model computes, also where
every weight is packed. And it answers `__torch_function__`,
so that the code around it does not change: `F.linear(x, layer.weight)`, `F.embedding`, Conv1D's `addmm`,
`x @ weight.T`, `weight[expert]` all work, in any architecture, on weights that stay packed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowbit.errors import FormatError, WeightError
from lowbit.formats import Format, InputQuantizer, Inputs, QTensor
from lowbit.kernels.dispatch import Dispatcher
from lowbit.nn import ops
from lowbit.nn.parts import Parts
from lowbit.nn.product import Product

# Python looks operators up on the class, where `__getattr__` is not asked.
_OPERATORS = [f"__{name}__" for name in ("matmul", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg")]


LIKE = "like"  # the name of the empty parameter


def _on_dense(name: str) -> Callable[..., Any]:
    """The operator `name` of a tensor, on the expanded weight."""

    def operator(self: Any, *others: Any) -> Any:
        return getattr(_dense(self), name)(*_dense(others))

    return operator


class PackedWeight(Parts):
    """A weight of `shape` [..., out, in] in `format`; `transposed` if its module keeps it as [..., in, out].

    `dtype` is the type that computing code sees; `.to(dtype)` changes only that. `inputs`: what becomes of the inputs
    of a linear layer before the product; looking up rows does not touch them. What it stores are further parts, named
    as in `Inputs.parts`. FormatError for a weight that is no matrix, as it has no linear layer of its own.
    """

    def __init__(
        self,
        fmt: Format,
        shape: tuple[int, ...],
        parts: dict[str, Tensor] | None = None,
        *,
        transposed: bool = False,
        dtype: torch.dtype = torch.float32,
        inputs: Inputs | None = None,
    ) -> None:
        super().__init__()
        if inputs is not None and len(shape) != 2:
            raise FormatError(f"the inputs of a weight of shape {tuple(shape)} cannot be {inputs}; only a matrix's can")
        self.format, self.stored_shape, self.transposed = fmt, tuple(shape), transposed
        self._dtype, self.inputs = dtype, inputs
        self._input_parts = inputs.parts(shape[-1]) if inputs else {}
        awaited = parts is None
        if parts is None:
            every = fmt.parts(tuple(shape)) | self._input_parts
            parts = {k: torch.empty(s, dtype=d, device="meta") for k, (d, s) in every.items()}
        self.set_parts(parts)
        self.settle(
            "cpu" if awaited else None
        )  # what spreads a model over devices moves it, and can move nothing from "meta"
        self.dispatcher = Dispatcher()
        self._number = ops.register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = ops.register(self)  # a copy is another weight

    @staticmethod
    def of(
        q: QTensor, *, transposed: bool = False, dtype: torch.dtype = torch.float32,
        inputs: Inputs | None = None, input_parts: Mapping[str, Tensor] | None = None,
    ) -> PackedWeight:  # fmt: skip
        """Wrap a QTensor, and the stored tensors of its inputs. FormatError when they are not what `inputs` stores."""
        if inputs is not None:
            InputQuantizer.of(inputs, q.shape[-1], input_parts or {})
        elif input_parts:
            raise FormatError(
                f"{sorted(input_parts)} belong to quantized inputs, and the inputs of this weight are float"
            )
        parts = q.parts() | dict(input_parts or {})
        return PackedWeight(q.format, q.shape, parts, transposed=transposed, dtype=dtype, inputs=inputs)

    def qtensor(self) -> QTensor:
        """The stored parts of the weight as a QTensor, sharing memory."""
        parts = {name: part for name, part in self.named_buffers() if name not in self._input_parts}
        return QTensor.from_parts(self.format, self.stored_shape, parts)

    def quantizer(self) -> InputQuantizer | None:
        """What becomes of the inputs, sharing memory; None where they stay as they are."""
        if self.inputs is None:
            return None
        parts = {name: self.get_buffer(name) for name in self._input_parts}
        return InputQuantizer.of(self.inputs, self.stored_shape[-1], parts)

    def settle(self, device: torch.device | str | None = None) -> None:
        """Put the empty parameter on a device (None: where the stored parts are), after code that moved these one by one."""
        like = torch.empty(0, dtype=self._dtype, device=device or self.device)
        self.register_parameter(LIKE, nn.Parameter(like, requires_grad=False))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as its module would hold it (transposed if it is), dense.

        A divisor of the inputs is in it, so that inputs need no division; only their rounding is lost.
        """
        if torch.compiler.is_compiling():
            like = self.get_buffer("codes")
            return ops.packed_dense(self._number, like, list(self.shape), dtype or self._dtype)
        dense = self._undivided(self.qtensor().dequantize, dtype)
        return dense.transpose(-1, -2) if self.transposed else dense

    def _undivided(self, read: Callable[[torch.dtype], Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """What `read(type)` gives, [..., in], for inputs that are not divided."""
        if "input_divisor" not in self._input_parts:
            return read(dtype or self._dtype)
        return (read(torch.float32) / self.get_buffer("input_divisor")).to(dtype or self._dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> x W^T + bias [..., out] with the fastest kernel that supports it.

        In the type of x, or in that of the weight where it is wider: a float16 model keeps a layer in float32 whose results
        leave the range of float16.
        """
        narrow = x.dtype.itemsize < self._dtype.itemsize
        if narrow and (x.is_meta or not torch.is_autocast_enabled(x.device.type)):
            x = x.to(self._dtype)
        if torch.compiler.is_compiling():
            return ops.packed_linear(x, self._number, bias, self.stored_shape[0])
        if torch.is_grad_enabled() and x.requires_grad:
            self._refuse_training()
            y: Tensor = Product.apply(x, self)
            # What a custom function returns may be a view that nobody may write to; models such as Falcon do.
            return y.clone() if bias is None else y + bias
        return self.dispatcher.linear(x, self.qtensor, bias, self.quantizer())

    def rows(self, index: Tensor) -> Tensor:
        """`weight[index]` for indices >= 0 into the first stored dimension, expanding only what is asked for."""
        if torch.compiler.is_compiling():
            return ops.packed_rows(index, self._number, list(self.shape[1:]), self._dtype)
        self._refuse_training()
        found = self._undivided(lambda dtype: self.qtensor().index(index, dtype))
        return found.transpose(-1, -2) if self.transposed else found

    def _refuse_training(self) -> None:
        """WeightError where somebody asked for gradients of this weight, which would come to nothing."""
        if self.training and torch.is_grad_enabled() and self._parameters[LIKE].requires_grad:  # type: ignore[union-attr]
            raise WeightError(
                f"a weight that is packed in {self.format} is not trained; train an adapter of it, or keep it in float when the model is quantized, "
                "as `w4,lm_head=keep` does for the head"
            )

    @property
    def data(self) -> Tensor:
        """The dense weight, apart from what is stored."""
        return self.dequantize().data

    @data.setter
    def data(self, value: Tensor) -> None:
        # As peft does when it merges an adapter: left alone, it would set an attribute and lose the adapter.
        raise WeightError(
            f"a weight that is packed in {self.format} takes no other values; `lowbit merge BASE ADAPTER -o OUT` merges an adapter, and model.dequantize() "
            "makes float weights of packed ones"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        self._dtype = fn(torch.empty(0, dtype=self._dtype)).dtype
        self.dispatcher = Dispatcher(self.dispatcher.only)  # what was prepacked for another device or type is of no use
        super()._apply(fn, recurse)
        self.settle()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + LIKE]

    def _load_from_state_dict(self, *args: Any) -> None:
        self.dispatcher = Dispatcher(self.dispatcher.only)  # and neither is what was prepacked of other values
        like = self._parameters.pop(LIKE)  # is in no file
        super()._load_from_state_dict(*args)
        self._parameters[LIKE] = like

    # Of a module these would change it in place. Code that casts its weight means what a tensor does.

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself, moved, when only a device is given; the dense weight when another type is."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        moved = self if device is None else super().to(device)
        return moved if dtype in (None, self._dtype) else moved.dequantize(dtype)

    def type(self, dtype: Any = None) -> Any:
        return self.dequantize().type() if dtype is None else self.dequantize().type(dtype)

    def float(self) -> Any:
        return self.to(torch.float32)

    def double(self) -> Any:
        return self.to(torch.float64)

    def half(self) -> Any:
        return self.to(torch.float16)

    def bfloat16(self) -> Any:
        return self.to(torch.bfloat16)

    # What code asks of a weight besides computing with it.

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self.get_buffer("codes").device

    @property
    def shape(self) -> torch.Size:
        *batch, out, inner = self.stored_shape
        return torch.Size([*batch, inner, out] if self.transposed else self.stored_shape)

    @property
    def ndim(self) -> int:
        return len(self.stored_shape)

    @property
    def requires_grad(self) -> bool:
        return False

    @property
    def T(self) -> _Transposed:  # noqa: N802 (the name that tensors have)
        return _Transposed(self)

    def t(self) -> _Transposed:
        return self.T

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int) and not isinstance(index, bool):
            return self[torch.tensor([index], device=self.device)][0]
        whole_rows = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
        if whole_rows and not (self.transposed and self.ndim == 2):
            return self.rows(torch.where(index < 0, index + len(self), index))
        return self.dequantize()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or not hasattr(Tensor, name):
                raise
        return getattr(self.dequantize(), name)

    __matmul__, __add__, __radd__, __sub__, __rsub__, __mul__, __rmul__, __truediv__, __neg__ = map(
        _on_dense, _OPERATORS
    )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*_dense(args), **_dense(kwargs or {}))

    def extra_repr(self) -> str:
        inputs = f", inputs={self.inputs}" if self.inputs else ""
        return f"{self.format}, shape={tuple(self.shape)}, dtype={str(self._dtype).removeprefix('torch.')}{inputs}"


class _Transposed:
    """`weight.T`, not yet computed: `x @ weight.T` is a linear layer."""

    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed

    __matmul__, __add__, __radd__, __sub__, __rsub__, __mul__, __rmul__, __truediv__, __neg__ = map(
        _on_dense, _OPERATORS
    )
    __getitem__ = _on_dense("__getitem__")

    def __rmatmul__(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self)  # type: ignore[call-overload]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.packed.dequantize().transpose(-1, -2), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return PackedWeight.__torch_function__(func, types, args, kwargs)


def _dense(value: Any) -> Any:
    """The same arguments with packed weights expanded."""
    if isinstance(value, PackedWeight):
        return value.dequantize()
    if isinstance(value, _Transposed):
        return value.packed.dequantize().transpose(-1, -2)
    if isinstance(value, (list, tuple)):
        return type(value)(_dense(v) for v in value)
    if isinstance(value, dict):
        return {k: _dense(v) for k, v in value.items()}
    return value


# The names of arguments are PyTorch's, because callers use them.


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, PackedWeight) or weight.ndim != 2 or weight.transposed:
        return NotImplemented
    return weight.linear(input, bias)


def _addmm(input: Tensor, mat1: Tensor, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Conv1D: bias + x [n, in] @ weight [in, out]."""
    plain = isinstance(mat2, PackedWeight) and mat2.transposed and isinstance(mat1, Tensor)
    if not plain or (beta, alpha) != (1, 1) or input.dim() != 1:
        return NotImplemented
    return mat2.linear(mat1, input)


def _matmul(input: Any, other: Any) -> Any:
    if isinstance(input, Tensor):
        if isinstance(other, _Transposed) and other.packed.ndim == 2 and not other.packed.transposed:
            return other.packed.linear(input)
        if isinstance(other, PackedWeight) and other.ndim == 2 and other.transposed:
            return other.linear(input)
    return NotImplemented


def _embedding(input: Tensor, weight: Any, *args: Any, **kwargs: Any) -> Any:
    # Other arguments (padding_idx, max_norm, sparse) only matter to training.
    return weight.rows(input) if isinstance(weight, PackedWeight) and not weight.transposed else NotImplemented


_HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.matmul: _matmul,
    F.embedding: _embedding,
}
