"""How much each token of the calibration text counts in the second moment of an input; one file each."""
