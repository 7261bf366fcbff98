"""Adadelta."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adadelta import adadelta as adadelta

from optim_ext._fused_step import FusedStep, Group


class Adadelta(FusedStep, torch.optim.Adadelta):
    __doc__ = torch.optim.Adadelta.__doc__

    _op = "adadelta_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("square_avg", "acc_delta", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in ("lr", "rho", "eps", "weight_decay", "maximize"))
