"""Resilient backpropagation."""

from __future__ import annotations

import torch
from torch.optim.rprop import rprop as rprop

from optim_ext._step import FusedStep


class Rprop(FusedStep, torch.optim.Rprop):
    __doc__ = torch.optim.Rprop.__doc__

    _op = "rprop_"
