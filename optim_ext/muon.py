"""Muon."""

from __future__ import annotations

from typing import Any

import torch

from optim_ext._fused_step import FusedStep, Group


class Muon(FusedStep, torch.optim.Muon):
    __doc__ = torch.optim.Muon.__doc__

    _op = "muon_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("momentum_buffer",)

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        coefficients = self._values(group, "ns_coefficients", 3)
        options = (group[name] for name in ("lr", "weight_decay", "momentum", "nesterov"))
        match_rms_adamw = group["adjust_lr_fn"] == "match_rms_adamw"
        return (*options, *coefficients, group["eps"], group["ns_steps"], match_rms_adamw)
