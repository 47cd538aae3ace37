"""TurboQuant: rotate, keep the norm, and take the levels that are best for what a rotation leaves.

With H the Hadamard matrix of a head's width n, whatever x was, x H / sqrt(n) has coordinates close to normal with the
variance |x|^2 / n. So one table of levels serves all, the one of Lloyd (1957) and Max (1960) for N(0, 1):

    y = x H / sqrt(n)        s = |y| / sqrt(n) u        code = the level nearest to y / s, of normal1 to normal7
    read back: s level[code] H' / sqrt(n)

u brings the table, which is in whole numbers, to the unit of N(0, 1); s is then corrected once by least squares (the fit `norm`).

Source: TurboQuant (Zandieh et al. 2025, arXiv 2504.19874), algorithm 1, the quantizer for least squared error. What differs: a
Hadamard matrix in place of a random rotation, and levels for the limit of large n in place of those for n. Left out: the bit that algorithm 2
spends on the signs of projected residuals, to make products of vectors right on average, which softmax does not reward.

Error: |x|^2 times 0.363, 0.117, 0.035 and 0.0095 at 1 to 4 bits. At 8 bits the levels are those of int8, which has as many whole
numbers. Bits of a head of 64 channels: 4 and 16/64 at 4 bits. On small models 4 bits may be too few for keys; `lowbit check-kv`
tells.
"""

from lowbit.kv.named import Published

_SIDE = "rotate+norm@normal{bits}"
METHOD = Published(
    "turboquant",
    usual=4,
    bits=range(1, 9),
    keys=_SIDE,
    values=_SIDE,
    others={8: ("rotate+norm@int8", "rotate+norm@int8")},
)
