"""Write a model whose keys have channels of large magnitude, and which computes the same.

    python benchmarks/key_outliers.py MODEL OUT [--channels 2] [--factor 16]

In each head of keys, both members of a few rotary pairs are multiplied by a factor in `k_proj`, and divided by it in `q_proj` of all queries that
read that head. A rotary embedding turns a pair by an angle, so both keep their factor, every score q k' is what it was, and the function
of the model stays the same. What a cache stores is not the same: one scale for a key now serves channels that differ by the factor. Published
models have such channels by themselves; Qwen2.5, through the biases of its `k_proj`, is the best known, and transformers' int4 cache
found 0 of 120 needles with it where the float cache found 98 (huggingface/transformers#35185).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from lowbit.interchange.opening import open_source

SEED = 20261128


@torch.no_grad()
def widen_keys(model: Any, channels: int = 2, factor: float = 16.0, seed: int = SEED) -> None:
    """Multiply `channels` rotary pairs of every key head by `factor`, and divide the queries by it, in place."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    heads, groups = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        scale = torch.ones(heads, width)
        for head in range(heads):
            pairs = torch.randperm(width // 2, generator=generator)[:channels]
            scale[head, pairs] = scale[head, pairs + width // 2] = factor
        keys, queries = layer.self_attn.k_proj, layer.self_attn.q_proj
        keys.weight.mul_(scale.flatten()[:, None])
        queries.weight.div_(scale.repeat_interleave(groups, 0).flatten()[:, None])
        for part, by in ((keys, scale.flatten()), (queries, 1 / scale.repeat_interleave(groups, 0).flatten())):
            if part.bias is not None:
                part.bias.mul_(by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--channels", type=int, default=2)
    parser.add_argument("--factor", type=float, default=16.0)
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    model = source.load_float(torch.float32)
    widen_keys(model, arguments.channels, arguments.factor)
    model.save_pretrained(arguments.out)
    source.tokenizer().save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
