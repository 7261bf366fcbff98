"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.radam import radam as radam

from optim_ext._fused_step import FusedStep, Group


class RAdam(FusedStep, torch.optim.RAdam):
    __doc__ = torch.optim.RAdam.__doc__

    _op = "radam_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return (
            group["lr"],
            *self._values(group, "betas", 2),
            group["eps"],
            group["weight_decay"],
            group["maximize"],
            group["decoupled_weight_decay"],
        )
