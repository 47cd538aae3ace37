"""What a recipe makes of a model, before a weight is read."""
