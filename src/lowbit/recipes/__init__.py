"""What to do with a model, as a value: recipes, their text, presets."""
