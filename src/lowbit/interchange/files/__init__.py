"""Files and folders: safetensors, locks, atomic saving."""
