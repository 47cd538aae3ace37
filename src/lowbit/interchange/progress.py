"""How long work tells how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as `progress(name of the tensor at hand, bytes done, bytes in all)`."""
