"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

import torch
from torch.optim.nadam import nadam as nadam

from optim_ext._step import FusedStep


class NAdam(FusedStep, torch.optim.NAdam):
    __doc__ = torch.optim.NAdam.__doc__

    _op = "nadam_"
