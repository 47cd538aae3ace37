"""Files and folders: safetensors, claims, atomic saving."""
