"""Fast generation for the families that it knows: a decoder in C++ over packed weights."""
