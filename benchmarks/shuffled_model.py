"""Write the benchmark model: SmolLM2-135M-Instruct in float32 with its channels shuffled.

    python benchmarks/shuffled_model.py OUT

The weights come from a Q4_1 file, in which every aligned run of 32 weights of a row lies on 16 levels; a 4-bit
format with groups of 32 would find its answer there for free. Reordering the channels of the residual stream, of
the MLP and of each value head computes the same function and takes those runs apart.
"""

from __future__ import annotations

import argparse

import torch

from lowbit.interchange.opening import open_source

SEED = 20261121


@torch.no_grad()
def shuffle(model: torch.nn.Module) -> None:
    """Permute the channels in place: residual stream, then for each layer the MLP and every value head."""
    config, generator = model.config, torch.Generator().manual_seed(SEED)

    def order(size: int) -> torch.Tensor:
        return torch.randperm(size, generator=generator)

    residual = order(config.hidden_size)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, residual])
    model.model.norm.weight.copy_(model.model.norm.weight[residual])
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[residual])
        for read in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            read.weight.copy_(read.weight[:, residual])
        for write in (attention.o_proj, mlp.down_proj):
            write.weight.copy_(write.weight[residual])
        inner = order(config.intermediate_size)
        for up in (mlp.gate_proj, mlp.up_proj):
            up.weight.copy_(up.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])
        value = attention.v_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
        out = attention.o_proj.weight.view(config.hidden_size, config.num_key_value_heads, groups, config.head_dim)
        for head in range(config.num_key_value_heads):
            within = order(config.head_dim)
            value[head] = value[head][within].clone()
            out[:, head] = out[:, head][:, :, within].clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out")
    arguments = parser.parse_args()
    source = open_source("smollm2")
    model = source.load_float()
    probe = torch.arange(0, 49152, 769)[None]
    with torch.no_grad():
        before = model(probe).logits
        shuffle(model)
        drift = float((model(probe).logits - before).abs().max())
    if drift > 1e-3:
        raise SystemExit(f"shuffling changed the function: a logit moved by {drift}")
    model.save_pretrained(arguments.out)
    source.tokenizer().save_pretrained(arguments.out)
    print(
        f"{arguments.out}: {sum(p.numel() for p in model.parameters()):,} parameters, largest logit change {drift:.1e}"
    )


if __name__ == "__main__":
    main()
