"""Resilient backpropagation."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.rprop import rprop as rprop

from optim_ext._fused_step import FusedStep, Group


class Rprop(FusedStep, torch.optim.Rprop):
    __doc__ = torch.optim.Rprop.__doc__

    _op = "rprop_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("prev", "step_size", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return (*self._values(group, "etas", 2), *self._values(group, "step_sizes", 2), group["maximize"])
