"""The schemes of compressed-tensors: how it describes and stores a linear layer."""
