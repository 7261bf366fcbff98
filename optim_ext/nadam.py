"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.nadam import nadam as nadam

from optim_ext._fused_step import FusedStep, Group


class NAdam(FusedStep, torch.optim.NAdam):
    __doc__ = torch.optim.NAdam.__doc__

    _op = "nadam_"
    _scalar_state = frozenset({"step", "mu_product"})

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "mu_product", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return (
            group["lr"],
            *self._values(group, "betas", 2),
            group["eps"],
            group["weight_decay"],
            group["momentum_decay"],
            group["maximize"],
            group["decoupled_weight_decay"],
        )
