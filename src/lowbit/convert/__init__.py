"""From one kind of file to another: import, dequantize, export, and quantizing straight to a target.

`lowbit.convert` is also the function that ends training (`training/converting.py`). Python makes a package an attribute of the
one that it is in, whatever that has under this name, so the package takes the calls of the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that can be called; its documentation and signature are those of the function."""

    @property
    def __wrapped__(self) -> Any:
        from lowbit.training.converting import convert

        return convert

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.__wrapped__(*args, **options)


_Callable.__doc__ = property(lambda self: self.__wrapped__.__doc__)  # type: ignore[assignment]
sys.modules[__name__].__class__ = _Callable
