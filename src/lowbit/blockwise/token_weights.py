"""Token weights of a calibrated run: computed once with the whole float model, then read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbit.blockwise.precision import products_in
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.hf.text_config import text_config
from lowbit.interchange.source import Source
from lowbit.kernels.heap import trim
from lowbit.solvers import Call

FILE = "token-weights.safetensors"


class TokenWeights:
    """By weight and micro-batch, [tokens]; None for weights that have none, such as experts."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @staticmethod
    def of(
        call: Call | None, source: Source, names: Sequence[str], batches: Sequence[Tensor], folder: Path,
        dtype: torch.dtype,
    ) -> TokenWeights:  # fmt: skip
        """Those that the recipe's weighting gives, from the file where a run before this one left them."""
        if call is None:
            return TokenWeights(None)
        path = folder / FILE
        if not path.is_file():
            model = source.load_float(torch.float32)
            for config in (model.config, text_config(model.config)):  # type: ignore[operator,union-attr]
                config.use_cache = False
            found = call.method.function(model, names, batches, products_in(dtype), **dict(call.options))
            tensors = {f"{name}/{i}": w.half() for name, parts in found.items() for i, w in enumerate(parts)}
            del model, found
            trim()
            folder.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(FILE + ".new")
            save_file(tensors, fresh)
            replace_file(fresh, path)
        return TokenWeights(path)

    def read(self, name: str, batch: int) -> Tensor | None:
        """Weights of the tokens of one micro-batch, float32."""
        if self.path is None:
            return None
        with safe_open(self.path, framework="pt") as file:
            key = f"{name}/{batch}"
            return file.get_tensor(key).float() if key in set(file.keys()) else None

    def clear(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
