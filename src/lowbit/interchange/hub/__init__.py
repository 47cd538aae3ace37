"""Models by name: the Hugging Face hub, and smollm2."""
