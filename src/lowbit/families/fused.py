"""Layers that read one input and that engines and servers store as one matrix, by the last words of their names.

What names mean by convention, in families of which lowbit knows no more: (vLLM's name of the whole (`packed_modules_mapping`) or
None, the parts).
"""

from __future__ import annotations

TOGETHER: tuple[tuple[str | None, tuple[str, ...]], ...] = (
    ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("gate_up_proj", ("gate_proj", "up_proj")),
    ("gate_up_proj", ("w1", "w3")),
    (None, ("query", "key", "value")),
    (None, ("wi_0", "wi_1")),
    ("fused_qkv_a_proj", ("q_a_proj", "kv_a_proj_with_mqa")),
    (None, ("in_proj_qkvz", "in_proj_ba")),
)
