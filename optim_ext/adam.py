"""Adam, and AMSGrad with ``amsgrad=True``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adam import adam as adam

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Adam(FusedStep, torch.optim.Adam):
    __doc__ = torch.optim.Adam.__doc__

    _op = "adam_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            betas: tuple[float | Tensor, float | Tensor] = ...,
            eps: float = ...,
            weight_decay: float = ...,
            amsgrad: bool = ...,
            *,
            foreach: bool | None = ...,
            maximize: bool = ...,
            capturable: bool = ...,
            differentiable: bool = ...,
            fused: bool | None = ...,
            decoupled_weight_decay: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None, "step")
