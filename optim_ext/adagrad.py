"""Adagrad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as adagrad

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Adagrad(FusedStep, torch.optim.Adagrad):
    __doc__ = torch.optim.Adagrad.__doc__

    _op = "adagrad_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            lr_decay: float = ...,
            weight_decay: float = ...,
            initial_accumulator_value: float = ...,
            eps: float = ...,
            foreach: bool | None = ...,
            *,
            maximize: bool = ...,
            differentiable: bool = ...,
            fused: bool | None = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _init_group(self, group: Any, *lists: Any, **named: Any) -> Any:
        """As torch's, which before 2.14 refuses fused=True on a GPU for want of a kernel."""
        stepping = [p for p in group["params"] if p.grad is not None]
        if stepping and all(p.is_cuda and p.is_floating_point() for p in stepping):
            self._need_device_dtype_check_for_fused = False
        return super()._init_group(group, *lists, **named)

    def _first_value(self, group: Group, key: str) -> float | None:
        return float(group["initial_accumulator_value"]) if key == "sum" else None

    def _takes_sparse(self, group: Group) -> bool:
        return bool(group["weight_decay"] == 0)
