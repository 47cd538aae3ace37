"""The one door to transformers' internals."""
