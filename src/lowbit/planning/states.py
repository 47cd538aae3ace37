"""What a layer without attention keeps of a text: a state of one size, whatever the length. As a config says it, by the names of its fields."""

from __future__ import annotations

from collections.abc import Callable

First = Callable[..., int]
"""The first of the named fields of a config that is a whole number above 0; 0 where none is."""


def state_numbers(first: First) -> int:
    """Numbers that one layer with a state keeps; 0 where the config says nothing that is known."""
    return next((found for rule in _RULES if (found := rule(first))), 0)


def _mamba(first: First) -> int:
    """The state of each channel, and the last inputs of its convolution.

    Mamba 2 also convolves B and C of each group. Sources: Gu and Dao 2023; Dao and Gu 2024.
    """
    size = first("state_size", "mamba_d_state", "ssm_state_size")
    if not size:
        return 0
    heads = first("mamba_n_heads", "mamba_num_heads", "n_mamba_heads")
    # The field of the whole config that is called so may be the width of the MLP of a hybrid.
    inner = (
        first("mamba_d_ssm")
        or heads * first("mamba_d_head", "mamba_head_dim", "mamba_headdim")
        or first("mamba_expand") * first("hidden_size")
        or first("intermediate_size")
        or first("expand") * first("hidden_size")
    )
    convolved = inner + 2 * first("n_groups", "mamba_n_groups", "mamba_ngroups") * size
    return inner * size + convolved * first("conv_kernel", "mamba_d_conv")


def _delta_net(first: First) -> int:
    """Gated delta net: a matrix of keys and values for each head, and the last inputs of the convolution of q, k and v. Yang et al. 2024."""
    heads, keys = first("linear_num_value_heads"), first("linear_num_key_heads")
    key, value = first("linear_key_head_dim"), first("linear_value_head_dim")
    convolved = 2 * keys * key + heads * value
    return heads * key * value + convolved * first("linear_conv_kernel_dim")


def _decaying(first: First) -> int:
    """A square matrix for each head, as of Kimi's delta attention, with the last inputs of three convolutions."""
    heads, width = first("linear_num_heads"), first("linear_head_dim")
    return heads * width * width + 3 * heads * width * first("linear_conv_kernel_dim")


def _convolution(first: First) -> int:
    """The last inputs of a short convolution alone."""
    return first("hidden_size") * first("conv_L_cache")


def _recurrence(first: First) -> int:
    """A gated linear recurrence with its convolution. De et al. 2024."""
    width = first("lru_width")
    return width + width * first("conv1d_width")


def _linear(first: First) -> int:
    """Linear attention: a matrix of keys and values for each head. Katharopoulos et al. 2020."""
    heads = first("num_attention_heads")
    width = first("head_dim") or (first("hidden_size") // heads if heads else 0)
    return heads * width * width


_RULES = (_mamba, _delta_net, _decaying, _convolution, _recurrence, _linear)  # the first that gives something is taken
