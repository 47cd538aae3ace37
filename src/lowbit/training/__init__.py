"""Training with the rounding in place: fake-quantized models, and their exact way back to packed ones."""
