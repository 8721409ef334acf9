"""What a training step will be on a GPU that is not there: compiled, then counted."""
