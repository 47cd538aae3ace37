"""llama.cpp as it is on PyPI (`pip install xllamacpp`), asked for tokens and for the next token's log probabilities."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch


class LlamaCpp:
    """A GGUF file in llama.cpp's server: float32 keys and values, one thread."""

    def __init__(self, file: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads, params.warmup = 128, 1, 1, False
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server: Any = xllamacpp.Server(params)

    def tokens(self, text: str) -> list[int]:
        body = json.dumps({"content": text, "add_special": False}).encode()
        request = urllib.request.Request(
            self.server.listening_address + "/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return list(json.loads(answer.read())["tokens"])

    def log_probabilities(self, ids: list[int], vocabulary: int) -> torch.Tensor:
        """float32 [vocabulary]: of the token that follows `ids`."""
        answer = self.server.handle_completions(
            {"prompt": ids, "n_predict": 1, "n_probs": vocabulary, "temperature": -1.0, "cache_prompt": False}
        )
        out = torch.full((vocabulary,), torch.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            out[entry["id"]] = entry["logprob"]
        return out

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The likeliest `count` tokens after `ids`, one after the other, whatever they mean."""
        found: list[int] = []
        while len(found) < count:  # one at a time: the server would stop at the token that ends a text
            answer = self.server.handle_completions(
                {"prompt": ids + found, "n_predict": 1, "n_probs": 1, "temperature": -1.0, "cache_prompt": True}
            )
            found.append(int(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["id"]))
        return found
