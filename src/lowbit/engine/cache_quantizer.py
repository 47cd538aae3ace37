"""`from_pretrained` of a folder of lowbit: packed weights, and answers that store the KV cache as the folder says."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit.engine.folder_cache import sizes_of, use_cache_format
from lowbit.interchange.hf.quantizer import LowbitQuantizer
from lowbit.kv import CacheFormat
from lowbit.kv.folder import parsed, read_cache_tables
from lowbit.kv.tables import TablesOfLayers
from lowbit.planning.kv_cache import kv_cache


class CacheQuantizer(LowbitQuantizer):
    """What `from_pretrained` of a folder of lowbit goes through: packed weights, and the cache format that the folder carries."""

    _cache: CacheFormat | None = None
    _tables: TablesOfLayers | None = None

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, stored: Collection[str] = (), **kwargs: Any
    ) -> None:
        super()._process_model_before_weight_loading(model, checkpoint_files, stored, **kwargs)
        self._cache = parsed(self.quantization_config.kv, "config.json")
        if self._cache is not None and checkpoint_files:
            sizes = sizes_of(kv_cache(model.config))
            with torch.device("cpu"):  # the model is built without memory here
                self._tables = read_cache_tables(Path(checkpoint_files[0]).parent, self._cache, sizes)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model = super()._process_model_after_weight_loading(model, **kwargs)
        use_cache_format(model, self._cache, self._tables)
        return model
