"""One weight to its stored form."""
