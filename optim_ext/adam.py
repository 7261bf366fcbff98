"""Adam, and AMSGrad with ``amsgrad=True``."""

from __future__ import annotations

import torch
from torch.optim.adam import adam as adam

from optim_ext._step import FusedStep, Group


class Adam(FusedStep, torch.optim.Adam):
    __doc__ = torch.optim.Adam.__doc__

    _op = "adam_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step")
