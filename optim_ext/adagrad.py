"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch

from optim_ext._fused_step import FusedStep, Group


class Adagrad(FusedStep, torch.optim.Adagrad):
    __doc__ = torch.optim.Adagrad.__doc__

    _op = "adagrad_"
    _takes_sparse = True

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("sum", "step")

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        return tuple(group[name] for name in ("lr", "lr_decay", "weight_decay", "eps", "maximize"))
