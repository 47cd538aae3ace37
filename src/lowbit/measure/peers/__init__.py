"""Other programs that `bench` measures in the same rounds, one file each. A new one needs no change elsewhere."""
