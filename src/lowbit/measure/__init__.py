"""What quantizing cost: quality, size, speed and memory, by one protocol."""
