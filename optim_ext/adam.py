"""Adam, and AMSGrad with ``amsgrad=True``."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adam import adam as adam

from optim_ext._fused_step import FusedStep, Group


class Adam(FusedStep, torch.optim.Adam):
    __doc__ = torch.optim.Adam.__doc__

    _op = "adam_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        names = ("weight_decay", "eps", "amsgrad", "maximize", "decoupled_weight_decay")
        return (group["lr"], *self._values(group, "betas", 2), *(group[name] for name in names))
