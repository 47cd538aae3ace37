"""Adapters of PEFT: read without it, merged into weights as these are read, and run beside packed weights."""
