"""GGUF: one file for llama.cpp, Ollama and whatever else is built on ggml."""

from lowbit.interchange.exporters.gguf.export import Gguf

__all__ = ["Gguf"]
