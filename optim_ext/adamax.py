"""Adamax: Adam under the infinity norm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adamax import adamax as adamax

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Adamax(FusedStep, torch.optim.Adamax):
    __doc__ = torch.optim.Adamax.__doc__

    _op = "adamax_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            betas: tuple[float, float] = ...,
            eps: float = ...,
            weight_decay: float = ...,
            foreach: bool | None = ...,
            *,
            maximize: bool = ...,
            differentiable: bool = ...,
            capturable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
