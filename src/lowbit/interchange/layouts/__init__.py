"""How other programs lay codes out in tensors: pure functions, packing and unpacking, shared by readers and writers."""
