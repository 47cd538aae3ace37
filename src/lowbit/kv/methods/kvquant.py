"""KVQuant: levels learned from text, where errors that the loss feels weigh more.

    keys      x ~ s_c level[code] + o_c
    values    x ~ s_t level[code],  s_t = max|x_t| / 127

s and o of each channel c of the keys come from calibration, s of each token t of the values from the token. Levels are found by
k-means over all numbers of a layer, each with the weight g^2 s^2, where g is the gradient of the loss with respect to the number: the
diagonal of the Fisher information tells what an error there costs. The channel of largest magnitude of each head is stored
as float16 (outliers), and the first token is read exactly (sinks).

Source: KVQuant (Hooper et al. 2024, arXiv 2401.18079), sections 3.1, 3.3, 3.4, 3.5. What differs: a cache gets keys after they
were rotated by their position, where the paper takes them before. Outliers are a channel, and not the largest 1 % of numbers wherever
they are. Values of a token are not centred. s_c and o_c start from deviation and mean of a channel, not from its range, and
end as the least squares for the levels; levels are whole numbers within +-127.

The scale of the range is the paper's; on SmolLM2-135M at 3 bits one by `search` (v=search@kmeans3:cb=tensor:sinks=1) brought the KL of values in
few bits from 0.057 to 0.044.

Bits of a head of 64 channels: 3 and 16/64 for keys, another 16/64 for values.
"""

from lowbit.kv.named import Published

METHOD = Published(
    "kvquant",
    usual=3,
    bits=range(1, 7),
    keys="kmeans{bits}:*x1:cb=tensor:sinks=1:outliers=1",
    values="kmeans{bits}:cb=tensor:sinks=1:outliers=1",
)
