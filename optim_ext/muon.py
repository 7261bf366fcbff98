"""Muon."""

from __future__ import annotations

from typing import Any

import torch

from optim_ext._step import FusedStep, Group


class Muon(FusedStep, torch.optim.Muon):
    __doc__ = torch.optim.Muon.__doc__

    _op = "muon_"
    _about_whole_tensors = True

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        options = {
            "ns_coefficients": self._values(group, "ns_coefficients", 3),
            "match_rms_adamw": group["adjust_lr_fn"] == "match_rms_adamw",
        }
        return super()._hypers({**group, **options})
