"""Slow and plain implementations of what torch.optim does not have (or not for every shape: Adafactor), written from the
papers: the oracle of our kernels."""

from reference.adafactor import Adafactor
from reference.lamb import LAMB
from reference.lars import LARS
from reference.lion import Lion

__all__ = ["LAMB", "LARS", "Adafactor", "Lion"]
