"""What is read: folders, GGUF, modules, quantized checkpoints."""
