"""How the streams of a calibrated run compute."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Settings:
    """`autocast`: products in bfloat16 (everything else float32), where the machine is fast at it."""

    autocast: bool

    @staticmethod
    def of_this_machine() -> Settings:
        return Settings(bool(torch.cpu._is_avx512_bf16_supported()) or bool(torch.cpu._is_amx_tile_supported()))

    def context(self) -> AbstractContextManager[Any]:
        """Enter it around a forward; it may be entered again."""
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if self.autocast else nullcontext()
