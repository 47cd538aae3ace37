"""Next-token log-probabilities and greedy tokens of a folder by vLLM, without lowbit. See README.md."""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm import __version__ as version

NEW = 8


def kernels() -> list[str]:
    """The kernels that the layers of the loaded model have."""
    gc.unfreeze()  # vLLM hides what it has loaded from the collector
    return sorted({type(o).__name__ for o in gc.get_objects() if type(o).__name__.endswith("LinearKernel")})


def cache(model: LLM) -> dict[str, object]:
    """What keys and values are kept in, and the scales of the attention layers in their order."""
    found = [o for o in gc.get_objects() if type(o).__name__ == "Attention" and hasattr(o, "_k_scale_float")]
    found.sort(key=lambda layer: int(layer.layer_name.split(".layers.")[-1].split(".")[0]))
    kind = model.llm_engine.vllm_config.cache_config.cache_dtype
    return {"kind": kind, "scales": [[layer._k_scale_float, layer._v_scale_float] for layer in found]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids")
    parser.add_argument("out", type=Path)
    parser.add_argument("folder", metavar="DTYPE=FOLDER")
    given = parser.parse_args()
    dtype, _, folder = given.folder.partition("=")
    with open(given.ids) as file:
        rows = json.load(file)
    model = LLM(
        folder, dtype=dtype, enforce_eager=True, max_model_len=max(map(len, rows)) + NEW,
        max_num_seqs=len(rows), max_logprobs=-1,
    )  # fmt: skip
    config = model.llm_engine.model_config
    size = config.get_vocab_size()
    asked = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    first = SamplingParams(temperature=0, max_tokens=1, logprobs=size, ignore_eos=True)
    prompts = [{"prompt_token_ids": row} for row in rows]
    logprobs = torch.full((len(rows), size), float("nan"))
    for i, done in enumerate(model.generate(prompts, first, use_tqdm=False)):
        for token, entry in done.outputs[0].logprobs[0].items():
            logprobs[i, token] = entry.logprob
    tokens = [list(done.outputs[0].token_ids) for done in model.generate(prompts, asked, use_tqdm=False)]
    save_file({"logprobs": logprobs, "tokens": torch.tensor(tokens)}, given.out / "0.safetensors")
    found = {"versions": {"vllm": version, "torch": torch.__version__}, "linear": kernels(), "cache": cache(model)}
    print(json.dumps(found | {"dtype": str(config.dtype).removeprefix("torch.")}), flush=True)
    os._exit(0)  # the engine's own teardown is not what is looked at here


if __name__ == "__main__":
    main()
