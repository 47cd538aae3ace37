"""T5: an encoder and a decoder, each layer of which reads the encoder's output."""

from __future__ import annotations

from lowbit.families.family import Between, Family, Graph

_ENC, _DEC = "encoder.block.{i}.layer.", "decoder.block.{i}.layer."
_ATTENTION = (f"{_ENC}0.SelfAttention", f"{_DEC}0.SelfAttention", f"{_DEC}1.EncDecAttention")
_MLP = (f"{_ENC}1.DenseReluDense", f"{_DEC}2.DenseReluDense")
FAMILY = Family(
    "t5",
    graph=Graph(
        norms={
            **{f"{b}0.layer_norm": tuple(f"{b}0.SelfAttention.{x}" for x in "qkv") for b in (_ENC, _DEC)},
            f"{_DEC}1.layer_norm": (f"{_DEC}1.EncDecAttention.q",),
            f"{_ENC}1.layer_norm": (f"{_ENC}1.DenseReluDense.wi*",),
            f"{_DEC}2.layer_norm": (f"{_DEC}2.DenseReluDense.wi*",),
            "encoder.final_layer_norm": (f"{_DEC}1.EncDecAttention.k", f"{_DEC}1.EncDecAttention.v"),
            "decoder.final_layer_norm": ("lm_head",),
        },
        between=(
            *(Between(f"{a}.v", f"{a}.o", "values") for a in _ATTENTION),
            *(Between(f"{f}.wi", f"{f}.wo", relu="dense_act_fn") for f in _MLP),
            *(Between(f"{f}.wi_1", f"{f}.wo") for f in _MLP),
        ),
        writers=("shared", *(f"{a}.o" for a in _ATTENTION), *(f"{f}.wo" for f in _MLP)),
        inside=tuple(f"{a}.relative_attention_bias" for a in _ATTENTION[:2]),
    ),
)
