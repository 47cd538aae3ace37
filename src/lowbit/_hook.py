"""Tell transformers of `quant_method: lowbit` once it is imported, without importing it.

`import lowbit` must stay cheap, and a model folder must load with plain `from_pretrained` afterwards. So a
finder waits for transformers' table of quantizers, lets it load as usual, and adds our entry to it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_TABLE = "transformers.quantizers.auto"


class _Register(importlib.abc.Loader):
    """The module's own loader, followed by our registration; leaves no trace of itself."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Register(spec.loader)
        return spec


def _register() -> None:
    """Packed weights, and generating with the cache format that a folder carries."""
    from lowbit.engine.cache_quantizer import CacheQuantizer
    from lowbit.interchange.hf.quantizer import register

    register(CacheQuantizer)


def install() -> None:
    """Register now if transformers is already there, else when it comes."""
    if _TABLE in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
