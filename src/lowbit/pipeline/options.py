"""The arguments of `quantize` as one value, handed on as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.interchange.progress import Progress
from lowbit.planning.plan import MAX_SHARD
from lowbit.weights.solve import Solved

OnLayer = Callable[[Solved], None]
EFFORT = "effort"  # its name in the first line of the journal of an unfinished run


@dataclass(frozen=True)
class Options:
    """See `quantize`. `samples` and `length`: None for as many as usual. `effort`: the rung that was taken, None where there was none to choose."""

    tokenizer: Any = None
    progress: Progress | None = None
    max_shard_bytes: int = MAX_SHARD
    overwrite: bool = False
    device: torch.device | str = "cpu"
    calibration: Any = None
    samples: int | None = None
    length: int | None = None
    chat: bool = False
    on_layer: OnLayer | None = None
    effort: str | None = None

    def of_text(self) -> dict[str, Any]:
        """Those that say how much text is taken, and how, as far as they were given."""
        given = {"samples": self.samples, "length": self.length, "chat": self.chat or None}
        return {name: value for name, value in given.items() if value is not None}


DEFAULTS = Options()
