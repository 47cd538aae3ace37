"""OPT: LayerNorm before each part, ReLU; the embedding may be narrower than the residual stream."""

from __future__ import annotations

from typing import Any

from lowbit.families.family import Between, Family, Graph

_LAYER = "model.decoder.layers.{i}."


def _refuses(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "with do_layer_norm_before=False its norms stand on the residual stream itself, not before the linears"
    return None


FAMILY = Family(
    "opt",
    norm="layer",
    graph=Graph(
        norms={
            f"{_LAYER}self_attn_layer_norm": tuple(f"{_LAYER}self_attn.{x}_proj" for x in "qkv"),
            f"{_LAYER}final_layer_norm": (f"{_LAYER}fc1",),
            "model.decoder.final_layer_norm": ("model.decoder.project_out|lm_head",),
        },
        between=(
            Between(f"{_LAYER}self_attn.v_proj", f"{_LAYER}self_attn.out_proj", "values"),
            Between(f"{_LAYER}fc1", f"{_LAYER}fc2", relu="activation_function"),
        ),
        writers=(
            "model.decoder.project_in|model.decoder.embed_tokens", "model.decoder.embed_positions",
            f"{_LAYER}self_attn.out_proj", f"{_LAYER}fc2",
        ),
        inside=("model.decoder.embed_tokens", "lm_head"),  # off the stream where project_in and project_out stand between
        refuses=_refuses,
    ),
)  # fmt: skip
