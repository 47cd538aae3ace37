"""A model of your own: any torch.nn.Module, quantized in memory, saved, and loaded into a fresh copy of itself.

    python examples/own_model.py [FOLDER]

A small network learns to tell two spirals apart. The script prints how many of the points it gets right, and the bytes that its
weights take, in float32 and in 8, 2 (too few) and 4 bits; then it saves the 4-bit one into FOLDER (a temporary one if
none is given) and says that a fresh network, loaded from there, answers the same to the last bit.
"""

import sys
import tempfile

import torch
from torch import Tensor, nn

import lowbit


def network() -> nn.Module:
    """Nothing that lowbit knows by name: weights are found by walking through the module."""
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))


def spirals(points: int) -> tuple[Tensor, Tensor]:
    """Points of two spirals [2 * points, 2] and to which each belongs [2 * points]."""
    angle = torch.linspace(0.5, 7, points)
    one = angle[:, None] / 7 * torch.stack([angle.cos(), angle.sin()], 1)
    return torch.cat([one, -one]), torch.arange(2).repeat_interleave(points)


def right(model: nn.Module, x: Tensor, label: Tensor) -> float:
    """The share of points that a network gets right."""
    return float((model(x).argmax(1) == label).float().mean())


def main(folder: str | None = None) -> dict[str, float]:
    """The share of points that each version gets right."""
    torch.manual_seed(0)
    (x, label), model = spirals(200), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), label).backward()
        optimizer.step()
    found = {"float32": right(model, x, label)}
    print(f"float32       {found['float32']:6.1%} right")
    for recipe in ("int8:channel", "int2:g32", "int4:g32"):
        small = lowbit.quantize(model, recipe)  # `model` itself stays as it is
        found[recipe] = right(small.model, x, label)
        print(f"{recipe:14}{found[recipe]:6.1%} right  {small.plan.bytes_after} of {small.plan.bytes_before} bytes")

    with tempfile.TemporaryDirectory() as room:
        again = lowbit.load_into(network(), small.save(folder or room))
    assert torch.equal(again(x), small.model(x))
    print("the last one, saved and loaded into a fresh network, answers the same")
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
