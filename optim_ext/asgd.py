"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.asgd import asgd as asgd

from optim_ext._fused_step import FusedStep, Group


class ASGD(FusedStep, torch.optim.ASGD):
    __doc__ = torch.optim.ASGD.__doc__

    _op = "asgd_"
    _scalar_state = frozenset({"step", "eta", "mu"})

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("mu", "ax", "eta", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in ("lr", "lambd", "alpha", "t0", "weight_decay", "maximize"))
