"""lowbit: make language models small, and see what it cost.

import lowbit
q = lowbit.quantize("smollm2", "w4")
print(q.report)
q.save("smollm2-w4")
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from lowbit import _hook
from lowbit.version import __version__ as __version__

# Public name -> the module that has it; imported when first used, so that `import lowbit` costs nothing.
_HOMES = {
    "Card": "lowbit.measure.card",
    "Engine": "lowbit.engine.engine",
    "Format": "lowbit.formats",
    "LowbitError": "lowbit.errors",
    "Plan": "lowbit.planning.plan",
    "QTensor": "lowbit.formats",
    "Quantized": "lowbit.pipeline.api",
    "Recipe": "lowbit.recipes.recipe",
    "allocate": "lowbit.budget.allocate",
    "bench": "lowbit.measure.bench",
    "compare": "lowbit.report.api",
    "dequantize": "lowbit.pipeline.loading",
    "dequantize_model": "lowbit.convert.dequantizing",
    "evaluate": "lowbit.measure.api",
    "export": "lowbit.convert.exporting",
    "import_model": "lowbit.convert.importing",
    "integer_matmul": "lowbit.kernels.integer",
    "load": "lowbit.pipeline.loading",
    "load_into": "lowbit.pipeline.loading",
    "parse_format": "lowbit.formats",
    "plan": "lowbit.pipeline.api",
    "quantize": "lowbit.pipeline.api",
    "quantize_tensor": "lowbit.pipeline.api",
    "recommend": "lowbit.report.recommend",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'lowbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


_hook.install()
