"""Adadelta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adadelta import adadelta as adadelta

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Adadelta(FusedStep, torch.optim.Adadelta):
    __doc__ = torch.optim.Adadelta.__doc__

    _op = "adadelta_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            rho: float = ...,
            eps: float = ...,
            weight_decay: float = ...,
            foreach: bool | None = ...,
            *,
            capturable: bool = ...,
            maximize: bool = ...,
            differentiable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
