"""What exporters of transformers folders share: integers as they store them, fused layers, writing a checkpoint."""
