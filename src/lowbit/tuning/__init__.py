"""Gradient descent on what is stored: scales, minima, learned levels, rounding, and the vectors that stay float."""
