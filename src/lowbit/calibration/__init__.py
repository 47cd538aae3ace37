"""Text that statistics are gathered on: files, records, windows, what the model writes itself."""
