"""Averaged stochastic gradient descent."""

from __future__ import annotations

import torch
from torch.optim.asgd import asgd as asgd

from optim_ext._step import FusedStep


class ASGD(FusedStep, torch.optim.ASGD):
    __doc__ = torch.optim.ASGD.__doc__

    _op = "asgd_"
