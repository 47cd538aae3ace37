"""Methods at work on a small weight and a few inputs: one file for each kind of method, found by registration."""
