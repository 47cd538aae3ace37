"""What lowbit knows of families of models, one file a family."""
