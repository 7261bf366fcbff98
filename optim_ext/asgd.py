"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.asgd import asgd as asgd

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class ASGD(FusedStep, torch.optim.ASGD):
    __doc__ = torch.optim.ASGD.__doc__

    _op = "asgd_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            lambd: float = ...,
            alpha: float = ...,
            t0: float = ...,
            weight_decay: float = ...,
            foreach: bool | None = ...,
            maximize: bool = ...,
            differentiable: bool = ...,
            capturable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
