"""SimQuant: the range of each channel onto all levels.

For each channel of the keys, and of the values, with X the numbers of one channel in a group of 64 tokens:

    s = (2^bits - 1) / (max(X) - min(X))        z = -min(X) s
    code = clamp(floor(X s + z + 0.5), 0, 2^bits - 1)
    read back: (code - z) / s

Source: LLMEasyQuant (Liu et al. 2024), 3.5.4 and 3.5.5, which names KVQuant as its origin. The paper takes the range of a
channel over all of X; here it is that of 64 tokens, so that tokens may come one by one. Stored are 1/s and z as
float16, and code and number follow from these. Numbers half way between two levels go to the even one, where the floor above
goes up. Tokens of a group that is not complete yet are kept exactly.

Error: at most half a step 1 / (2 s) for each number, and where a channel is far from zero the rounding of z to 11 bits
besides. Bits: 8 and 32/64 at 8 bits.
"""

from lowbit.kv.named import Published

_SIDE = "uint{bits}:64x1:zero=fp16"
METHOD = Published("simquant", usual=8, bits=range(1, 9), keys=_SIDE, values=_SIDE)
