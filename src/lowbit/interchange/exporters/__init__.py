"""Targets of an export: one file or package each, found by registration. The contract is in `exporter.py`."""
