"""Adam with decoupled weight decay."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw as adamw

from optim_ext.adam import Adam


class AdamW(Adam, torch.optim.AdamW):
    __doc__ = torch.optim.AdamW.__doc__

    _op = "adamw_"
