"""Rewrites of a model that keep its function and make it easier to quantize."""

from lowbit.transforms.arch import Arch, Link, Norm, Point, arch_of, shared_channels
from lowbit.transforms.awq import awq, clip_search
from lowbit.transforms.check import check_family, check_function
from lowbit.transforms.fold import fold
from lowbit.transforms.hadamard import Rotation, hadamard, rotation_for
from lowbit.transforms.registry import FACTS, check_order
from lowbit.transforms.rotate import rotate
from lowbit.transforms.scale import Scaling, apply_scale
from lowbit.transforms.smooth import smooth
from lowbit.transforms.transformed import TransformedSource

__all__ = [
    "FACTS", "Arch", "Link", "Norm", "Point", "Rotation", "Scaling",
    "TransformedSource", "apply_scale", "arch_of", "awq", "check_family", "check_function", "check_order",
    "clip_search", "fold", "hadamard", "rotate", "rotation_for", "shared_channels", "smooth",
]  # fmt: skip
