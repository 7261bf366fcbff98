"""In which precision parameters and their state are kept."""
