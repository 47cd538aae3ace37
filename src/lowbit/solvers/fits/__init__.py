"""Fits: how the range of a block becomes a scale and an offset. One file each, found by registration."""
