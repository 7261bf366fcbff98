"""State of other programs' optimizers, in the form that ours load."""
