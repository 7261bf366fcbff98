"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

import torch
from torch.optim.radam import radam as radam

from optim_ext._step import FusedStep


class RAdam(FusedStep, torch.optim.RAdam):
    __doc__ = torch.optim.RAdam.__doc__

    _op = "radam_"
