"""Calibration: a model run block by block over text."""
