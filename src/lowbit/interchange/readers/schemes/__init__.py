"""Readers of quantized checkpoints, one file for each `quant_method`; see `interchange/readers/quantized.py`."""
