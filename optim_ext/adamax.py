"""Adamax: Adam under the infinity norm."""

from __future__ import annotations

import torch
from torch.optim.adamax import adamax as adamax

from optim_ext._step import FusedStep


class Adamax(FusedStep, torch.optim.Adamax):
    __doc__ = torch.optim.Adamax.__doc__

    _op = "adamax_"
