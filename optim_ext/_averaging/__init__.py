"""Averages of models: rules, which tensors belong together, averaging within a step."""
