"""Adadelta."""

from __future__ import annotations

import torch
from torch.optim.adadelta import adadelta as adadelta

from optim_ext._step import FusedStep


class Adadelta(FusedStep, torch.optim.Adadelta):
    __doc__ = torch.optim.Adadelta.__doc__

    _op = "adadelta_"
