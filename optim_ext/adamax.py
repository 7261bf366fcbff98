"""Adamax: Adam under the infinity norm."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamax import adamax as adamax

from optim_ext._fused_step import FusedStep, Group


class Adamax(FusedStep, torch.optim.Adamax):
    __doc__ = torch.optim.Adamax.__doc__

    _op = "adamax_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_inf", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return (group["lr"], *self._values(group, "betas", 2), group["eps"], group["weight_decay"], group["maximize"])
