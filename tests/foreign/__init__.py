"""Scripts that run in the Python of another program, where lowbit need not be installed: FLOAT FOLDER, OUT FOLDER, a case.

Each writes a quantized checkpoint with that program and, beside it, the values that the program itself reads out of it
(`true.values`, a safetensors file of float32 by parameter name).
"""
