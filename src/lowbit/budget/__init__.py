"""A format for each layer under one target: size, bits, KL, memory."""
