"""Any model as an ordinary transformers folder: float weights under the names that save_pretrained gives them.

One tensor is in memory at a time, and fused experts are taken apart again, so that programs that read the published
checkpoint of a model read this one.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.errors import SourceError
from lowbit.interchange.claim import claimed
from lowbit.interchange.inventory import meta_model
from lowbit.interchange.older_readers import write_config
from lowbit.interchange.safetensors_writer import Shard, shards_of
from lowbit.interchange.source import Source, one_line, open_source
from lowbit.pipeline.driver import Progress
from lowbit.pipeline.folder_writer import FolderWriter, check_apart
from lowbit.pipeline.importing import cast, model_type
from lowbit.pipeline.loading import as_dtype
from lowbit.pipeline.plan import MAX_SHARD, TensorPlan


@dataclass(frozen=True)
class Dequantized:
    """What was written. `error`: |w - w'| / |w| of rounding the values to `dtype`, over all tensors; 0 when nothing was rounded."""

    folder: Path
    dtype: torch.dtype
    tensors: int
    bytes: int
    error: float


def dequantize_model(
    model: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    tokenizer: Any = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD,
) -> Dequantized:
    """Write `model`, quantized or not, as a float folder that transformers reads without lowbit.

    `dtype`: of every float tensor; None takes the type that the model's config names. WeightError when a value does not fit
    it. Nothing is at `out` before the folder is whole.
    """
    check_apart(Path(model), Path(out))
    source = open_source(model, tokenizer=tokenizer)
    if source.config is None:
        raise SourceError(f"{source.label} has no transformers config, without which there is no ordinary folder")
    wanted = as_dtype(dtype) or model_type(source)
    names = _Names(source, wanted)
    shards = shards_of(names.stored(), max_shard_bytes)
    with (
        claimed(out),
        FolderWriter(out, shards, _fingerprint(source, wanted, shards), _origin(source, wanted), overwrite) as writer,
    ):
        if not writer.finished:
            for name, made, error, norm in names.values(frozenset(writer.journal), progress):
                writer.write(name, made, error=error, norm=norm)
            writer.verify()
            source.save_assets(writer.partial)
            config = copy.deepcopy(source.config)
            config.dtype = wanted
            config.architectures = config.architectures or [source.inventory.model_class]
            write_config(config, writer.partial)
            writer.finish()
    facts = list(writer.journal.values())
    errors, norms = (sum(f[key] ** 2 for f in facts) ** 0.5 for key in ("error", "norm"))
    return Dequantized(
        Path(out), wanted, len(facts), sum(s.file_bytes for s in shards), errors / norms if norms else 0.0
    )


class _Names:
    """Tensors of the model under the names, and in the pieces, that save_pretrained gives them."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self._model = meta_model(source.config)  # type: ignore[arg-type]
        self._known = [name for name in source.tensors if name not in source.extra]
        whole = self._reverted({name: self._meta(name) for name in self._known})
        self._alone = {name: self._reverted({name: self._meta(name)}) for name in self._known}
        if {k for made in self._alone.values() for k in made} != set(whole):
            raise SourceError(
                f"{source.label}: transformers saves tensors of {type(self._model).__name__} that are made of several ones; "
                "load it with lowbit.load(..., kernel='dense') and save_pretrained instead"
            )

    def stored(self) -> list[tuple[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]]]:
        """(model name, name in the file -> type and shape), in the order of the model."""
        found = [(n, {k: (t.dtype, tuple(t.shape)) for k, t in made.items()}) for n, made in self._alone.items()]
        return found + [(n, {n: (self._type(n), self._source.tensors[n].shape)}) for n in self._source.extra]

    def values(
        self, done: frozenset[str], progress: Progress | None
    ) -> Iterator[tuple[str, dict[str, Tensor], float, float]]:
        """(model name, tensors to write, norm of the rounding error, norm of the values)."""
        sizes = {name: spec.nbytes for name, spec in self._source.tensors.items()}
        at = 0
        for name in (*self._known, *self._source.extra):
            if name not in done:
                value = self._source.read(name)
                plan = TensorPlan(name, tuple(value.shape), "other", self._type(name), False, None, None)
                made = cast(plan, value).stored[name]
                error = 0.0 if made.dtype == value.dtype else _norm(made.double().sub_(value.double()))
                pieces = {name: made} if name in self._source.extra else self._reverted({name: made})
                yield name, {k: t.contiguous() for k, t in pieces.items()}, error, _norm(value.double())
            at += sizes[name]
            if progress:
                progress(name, at, sum(sizes.values()))

    def _type(self, name: str) -> torch.dtype:
        own = self._source.tensors[name].dtype
        return self._dtype if own.is_floating_point else own

    def _meta(self, name: str) -> Tensor:
        return torch.empty(self._source.tensors[name].shape, dtype=self._type(name), device="meta")

    def _reverted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        try:
            made: dict[str, Tensor] = revert_weight_conversion(self._model, dict(tensors))
        except Exception as error:  # the rules are transformers'
            raise SourceError(
                f"{self._source.label}: transformers cannot name its tensors for saving ({one_line(error)})"
            ) from error
        return made


def _norm(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) if values.is_floating_point() else 0.0


def _fingerprint(source: Source, dtype: torch.dtype, shards: tuple[Shard, ...]) -> str:
    facts = {
        "dequantize": str(dtype), "source": source.identity(), "version": lowbit.__version__, "torch": torch.__version__,
        "headers": [hashlib.sha256(s.header).hexdigest() for s in shards],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _origin(source: Source, dtype: torch.dtype) -> dict[str, Any]:
    """Where the values come from, as the manifest says it. No time, no path."""
    return {
        "lowbit": lowbit.__version__, "dequantized": {"from": source.storage, "dtype": str(dtype).removeprefix("torch.")},
        "source": source.identity(),
    }  # fmt: skip
