"""From nothing to the first token, in a fresh process: seconds, and memory that is resident then."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from lowbit.engine.fallback import with_cache
from lowbit.interchange.files.settings import is_ours
from lowbit.interchange.opening import open_source
from lowbit.measure.memory import in_fresh_process
from lowbit.pipeline.loading import as_dtype, load

# Both make one token and print [now, resident with everything imported and no model, resident after the token].
_CODE = {
    "engine": """
import json, sys, time
from lowbit.engine.engine import Engine
from lowbit.errors import EngineError
from lowbit.measure.memory import resident
before = resident()
engine = Engine.open(**json.loads(sys.argv[1]))
try:
    engine.tokenizer
    prompt = "The secret of life is"
except EngineError:
    prompt = [3, 4, 5, 6, 7]
engine.generate(prompt, max_new_tokens=1)
print(json.dumps([time.time(), before, resident()]))
""",
    "transformers": """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from lowbit.measure.memory import resident
from lowbit.measure.token_times import greedy_times
from lowbit.measure.startup import load_module
before = resident()
greedy_times(load_module(**json.loads(sys.argv[1])), torch.tensor([[3, 4, 5, 6, 7]]), 1)
print(json.dumps([time.time(), before, resident()]))
""",
}


@dataclass(frozen=True)
class Startup:
    """seconds: from the start of the process to the first token, imports included. Bytes that are resident: with
    everything imported and nothing loaded, after the first token, and at most."""

    seconds: float
    imported: int
    resident: int
    peak: int


def startup(what: str, arguments: Mapping[str, Any]) -> Startup:
    """Open a model in a fresh process, by "engine" or "transformers", with these arguments, and make one token."""
    begin = time.time()
    done = in_fresh_process(["-c", _CODE[what], json.dumps(dict(arguments))])
    now, before, after = json.loads(done.stdout.splitlines()[-1])
    # Linux counts what is resident in batches, so that the peak may lag behind.
    return Startup(now - begin, before, after, max(after, done.bytes))


def load_module(model: str, dtype: str = "float32", cache: str | None = None) -> nn.Module:
    """A folder that lowbit wrote or a float model by any of its names, in transformers, computing in `dtype`.

    cache: the format of its KV cache, in place of what the folder says.
    """
    if is_ours(model):
        return with_cache(load(model, dtype=dtype), cache)
    found = as_dtype(dtype)
    assert found is not None
    return with_cache(open_source(model).load_float(found), cache)
