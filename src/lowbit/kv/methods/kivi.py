"""KIVI: keys by channel, values by token, the newest as they are.

Keys have a few channels that are large for every token, and values have none, so keys share a scale along a channel (32 tokens of it)
and values along a token (32 channels of it). With X the numbers of such a group:

    z = min(X)        s = (max(X) - min(X)) / (2^bits - 1)
    code = round((X - z) / s)
    read back: code s + z

Source: KIVI (Liu et al. 2024, arXiv 2402.02750), section 3.1 and algorithm 1, with its settings: groups of 32, and the newest 128
tokens in full precision. Where the paper stores keys when 128 have gathered, and so keeps between 0 and 127 of them exactly, the
newest 128 are exact here for every query.

Error: at most s / 2 for each number that is no longer among the newest. Bits: 2 and 32/32 at 2 bits, as float16 s and z.
"""

from lowbit.kv.named import Published

METHOD = Published(
    "kivi",
    usual=2,
    bits=range(1, 9),
    keys="uint{bits}:32x1:min=fp16:recent=128",
    values="uint{bits}:g32:min=fp16:recent=128",
)
