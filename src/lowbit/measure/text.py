"""The old place of `lowbit.interchange.text`."""

from lowbit.interchange.text import Text, load_text

__all__ = ["Text", "load_text"]
