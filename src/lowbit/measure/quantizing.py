"""`lowbit.quantize`: the pipeline's, and after it what a recipe leaves open of the KV cache, for which the result has to be run.

kv=auto is chosen by a check of the result (`measure/kv/`), and formats such as kvquant3 find their tables on calibration text. Both run the
model that was written, so they come after it; where they fail, the result is whole and only its cache format is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from lowbit.calibration.data import load_calibration
from lowbit.calibration.package_text import BUILTIN
from lowbit.interchange.progress import Progress, heard
from lowbit.kv import CacheFormat, calibrate
from lowbit.kv.folder import read_cache_format
from lowbit.kv.tables import TablesOfLayers
from lowbit.pipeline import api
from lowbit.pipeline.api import Quantized
from lowbit.recipes.cache_rules import AutoCache

_WINDOWS, _LENGTH = 8, 512  # of the text on which tables are found
CHECKING, CALIBRATING = "checking the KV cache", "finding the tables of the KV cache"


@wraps(api.quantize)
def quantize(*args: Any, **options: Any) -> Quantized:
    made = api.quantize(*args, **options)
    settle_cache(made, heard(options.get("progress")), options.get("tokenizer"), options.get("calibration"))
    return made


def settle_cache(
    made: Quantized, progress: Progress | None = None, tokenizer: Any = None, text: Any = None,
    told: Callable[[str], None] | None = None,
) -> None:  # fmt: skip
    """Give a quantized model the cache format that its recipe leaves open; nothing where it leaves none open, or where its folder has one.

    progress: as of `quantize`. text: what the weights were calibrated on, which serves tables too; None for the text that comes with lowbit.
    """
    wanted = made.plan.recipe.cache
    if wanted is None or (isinstance(wanted, CacheFormat) and not wanted.calibrated):
        return
    before = None if made.folder is None else read_cache_format(made.folder)
    if before is not None:  # of the same command, which wrote the folder earlier
        made.plan = made.plan.with_cache(before)
        return
    whole = made.plan.bytes_before

    def say(what: str) -> Callable[[int, int], None]:
        def step(done: int, total: int) -> None:
            if progress is not None:
                progress(what, whole * done // max(1, total), whole)

        step(0, 1)
        return step

    with _whole(made):
        if isinstance(wanted, AutoCache):
            from lowbit.measure.kv.check import choose_cache

            model = made if made.folder is None else str(made.folder)
            cache, _ = choose_cache(model, None, wanted.kl, tokenizer=tokenizer, progress=say(CHECKING), told=told)
        else:
            cache = wanted
        tables = None
        if cache.calibrated:
            say(CALIBRATING)
            tables = tables_for(made.model, cache, made.source if tokenizer is None else tokenizer, text)
        made.store_cache(cache, tables)


def tables_for(model: nn.Module, cache: CacheFormat, words: Any, text: Any = None) -> TablesOfLayers:
    """The tables of a calibrated format for a model, found on the first windows of a text; None for the one that comes with lowbit.

    words: a tokenizer, or a source that has one. TextError where there is none, RecipeError for models that it does not work for.
    """
    tokenizer = words.tokenizer() if hasattr(words, "tokenizer") and callable(words.tokenizer) else words
    found = load_calibration(
        BUILTIN if text is None else text, tokenizer, model, samples=_WINDOWS, length=_LENGTH
    )  # a model with fewer positions has shorter windows
    return calibrate(model, found.ids, cache)


@contextmanager
def _whole(made: Quantized) -> Iterator[None]:
    """Whatever ends this early leaves a result that is whole, which is said."""
    try:
        yield
    except BaseException as error:
        if made.folder is not None and Path(made.folder).is_dir():
            error.add_note(
                f"the weights are written and whole; only the format of the KV cache is missing, which `lowbit check-kv {made.folder} --write` finds"
            )
        raise
