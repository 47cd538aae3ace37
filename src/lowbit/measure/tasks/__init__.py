"""What is compared of models that predict no tokens, one file for each use that models are put to. A new one needs no change elsewhere."""
