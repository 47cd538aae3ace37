"""From one kind of file to another: import, dequantize, export."""
