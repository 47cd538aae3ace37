"""lowbit: make language models small, and see what it cost.

import lowbit
q = lowbit.quantize("smollm2", "w4")
print(q.report)
q.save("smollm2-w4")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit import _hook
from lowbit.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and type checkers: the same names, from the same modules
    from lowbit.adapters.source import with_adapter as with_adapter
    from lowbit.budget.allocate import allocate as allocate
    from lowbit.budget.allocation import Allocation as Allocation
    from lowbit.convert.dequantizing import dequantize_model as dequantize_model
    from lowbit.convert.direct import quantize_as as quantize_as
    from lowbit.convert.exporting import export as export
    from lowbit.convert.importing import import_model as import_model
    from lowbit.convert.merging import merge as merge
    from lowbit.engine.asking import chat as chat
    from lowbit.engine.asking import generate as generate
    from lowbit.engine.engine import Engine as Engine
    from lowbit.errors import LowbitError as LowbitError
    from lowbit.formats import Format as Format
    from lowbit.formats import QTensor as QTensor
    from lowbit.formats import parse_format as parse_format
    from lowbit.kernels.integer import integer_matmul as integer_matmul
    from lowbit.kv import CacheFormat as CacheFormat
    from lowbit.kv.quantized_cache import QuantizedCache as QuantizedCache
    from lowbit.measure.api import evaluate as evaluate
    from lowbit.measure.bench import bench as bench
    from lowbit.measure.card import Card as Card
    from lowbit.measure.kv.check import check_kv as check_kv
    from lowbit.measure.kv.result import CacheCheck as CacheCheck
    from lowbit.measure.quantizing import quantize as quantize
    from lowbit.pipeline.api import Quantized as Quantized
    from lowbit.pipeline.api import plan as plan
    from lowbit.pipeline.api import quantize_tensor as quantize_tensor
    from lowbit.pipeline.loading import dequantize as dequantize
    from lowbit.pipeline.loading import load as load
    from lowbit.pipeline.loading import load_into as load_into
    from lowbit.planning.plan import Plan as Plan
    from lowbit.recipes.recipe import Recipe as Recipe
    from lowbit.report.api import compare as compare
    from lowbit.report.card import card as card
    from lowbit.report.card import save_card as save_card
    from lowbit.report.comparison import Comparison as Comparison
    from lowbit.report.explain import explain as explain
    from lowbit.report.look import catalogue as catalogue
    from lowbit.report.look import doctor as doctor
    from lowbit.report.look import inspect as inspect
    from lowbit.report.recommend import recommend as recommend
    from lowbit.training.converting import convert as convert
    from lowbit.training.preparing import prepare_qat as prepare_qat

# Public name -> the module that has it; imported when first used, so that `import lowbit` costs nothing.
_HOMES = {
    "Allocation": "lowbit.budget.allocation",
    "CacheCheck": "lowbit.measure.kv.result",
    "CacheFormat": "lowbit.kv",
    "Card": "lowbit.measure.card",
    "Comparison": "lowbit.report.comparison",
    "Engine": "lowbit.engine.engine",
    "Format": "lowbit.formats",
    "LowbitError": "lowbit.errors",
    "Plan": "lowbit.planning.plan",
    "QTensor": "lowbit.formats",
    "Quantized": "lowbit.pipeline.api",
    "QuantizedCache": "lowbit.kv.quantized_cache",
    "Recipe": "lowbit.recipes.recipe",
    "allocate": "lowbit.budget.allocate",
    "bench": "lowbit.measure.bench",
    "card": "lowbit.report.card",
    "catalogue": "lowbit.report.look",
    "chat": "lowbit.engine.asking",
    "check_kv": "lowbit.measure.kv.check",
    "compare": "lowbit.report.api",
    "convert": "lowbit.training.converting",
    "dequantize": "lowbit.pipeline.loading",
    "dequantize_model": "lowbit.convert.dequantizing",
    "doctor": "lowbit.report.look",
    "evaluate": "lowbit.measure.api",
    "explain": "lowbit.report.explain",
    "export": "lowbit.convert.exporting",
    "generate": "lowbit.engine.asking",
    "import_model": "lowbit.convert.importing",
    "inspect": "lowbit.report.look",
    "integer_matmul": "lowbit.kernels.integer",
    "load": "lowbit.pipeline.loading",
    "load_into": "lowbit.pipeline.loading",
    "merge": "lowbit.convert.merging",
    "parse_format": "lowbit.formats",
    "plan": "lowbit.pipeline.api",
    "prepare_qat": "lowbit.training.preparing",
    "quantize": "lowbit.measure.quantizing",
    "quantize_as": "lowbit.convert.direct",
    "quantize_tensor": "lowbit.pipeline.api",
    "recommend": "lowbit.report.recommend",
    "save_card": "lowbit.report.card",
    "with_adapter": "lowbit.adapters.source",
}
# Of these, the calls that take long -> what they do, and what they count: people who watch see a bar (`report/watching.py`).
_WATCHED = {
    "allocate": ("measuring sensitivity", "steps"),
    "bench": ("measuring", "runs"),
    "check_kv": ("checking the cache", ""),
    "compare": ("comparing", ""),
    "dequantize_model": ("writing", "bytes"),
    "evaluate": ("measuring", "windows"),
    "export": ("exporting", "bytes"),
    "import_model": ("importing", "bytes"),
    "inspect": ("reading", "bytes"),
    "merge": ("merging", "bytes"),
    "quantize": ("quantizing", "bytes"),
    "quantize_as": ("quantizing", "bytes"),
    "recommend": ("recommending", "windows"),
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    found = getattr(import_module(_HOMES[name]), name)
    if name in _WATCHED:
        return import_module("lowbit.report.watching").watched(found, *_WATCHED[name])
    return found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_hook.install()
