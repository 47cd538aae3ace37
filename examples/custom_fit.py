"""A fit of your own: how the range of a block of weights becomes a scale.

    python examples/custom_fit.py

It prints the relative error |w - w_q| / |w| of `absmax` and of the fit below, in 4 bits with one scale a row: first of
a single matrix, then of what a small network answers. Cutting off the few largest weights makes the steps finer for all others,
so the second column is the smaller one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lowbit
from lowbit.formats import Format
from lowbit.solvers import fit


# The decorator is all that it takes: recipes now know `sigma_clip`, its option `k` included, and so does everything
# that takes a recipe. `offset="never"` says that it fills formats without a zero-point or minimum, as absmax does.
@fit(offset="never")
def sigma_clip(x: Tensor, fmt: Format, importance: Tensor | None = None, *, k: float = 2.5) -> Tensor:
    """The highest level at k standard deviations, or at the largest magnitude where that is nearer.

    x: float32 [blocks, weights of a block]; the result: a scale for each block, float32 [blocks]. `importance` has the
    shape of x and says how much the error of each weight counts; a fit may ignore it. Rounding is not its business.
    """
    reach = torch.minimum(x.abs().amax(1), k * x.square().mean(1).sqrt())
    return reach / fmt.grid.reach  # the highest level that both signs have: 7 for int4


def error(value: Tensor, wanted: Tensor) -> float:
    """|value - wanted| / |wanted|."""
    return float((value - wanted).norm() / wanted.norm())


def main(width: int = 512) -> dict[str, tuple[float, float]]:
    """The errors by recipe: of a matrix, and of a network of that width."""
    torch.manual_seed(0)
    weight, rows = torch.randn(width, width), torch.randn(64, width)
    network = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    for layer in (
        network[0],
        network[2],
    ):  # weights of trained networks are nearer to a bell curve than PyTorch's first ones
        nn.init.normal_(layer.weight, std=width**-0.5)

    found = {}
    for recipe in ("absmax@int4:channel", "sigma_clip(k=2.5)@int4:channel"):
        tensor = lowbit.quantize_tensor(weight, recipe).dequantize()
        small = lowbit.quantize(network, recipe).model
        with torch.no_grad():
            found[recipe] = error(tensor, weight), error(small(rows), network(rows))
        print(f"{recipe:32}  tensor {found[recipe][0]:.4f}  network {found[recipe][1]:.4f}")
    return found


if __name__ == "__main__":
    main()
