"""Adagrad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as adagrad

from optim_ext._step import FusedStep, Group


class Adagrad(FusedStep, torch.optim.Adagrad):
    __doc__ = torch.optim.Adagrad.__doc__

    _op = "adagrad_"

    def _init_group(self, group: Group, *lists: list[Tensor]) -> Any:
        """As torch's, which before 2.14 refuses fused=True on a GPU for want of a kernel."""
        stepping = [p for p in group["params"] if p.grad is not None]
        if stepping and all(p.is_cuda and p.is_floating_point() for p in stepping):
            self._need_device_dtype_check_for_fused = False
        return super()._init_group(group, *lists)

    def _first_value(self, group: Group, key: str) -> float | None:
        return float(group["initial_accumulator_value"]) if key == "sum" else None

    def _takes_sparse(self, group: Group) -> bool:
        return bool(group["weight_decay"] == 0)
