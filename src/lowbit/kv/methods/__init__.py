"""Published methods for the KV cache, one file each: formula, source, and its text in the grammar of `side.py`."""
