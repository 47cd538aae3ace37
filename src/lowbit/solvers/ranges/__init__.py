"""Range estimators: from which values to which the inputs of a layer are stored; one file each, found by walking."""
