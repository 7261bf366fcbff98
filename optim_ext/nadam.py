"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.nadam import nadam as nadam

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class NAdam(FusedStep, torch.optim.NAdam):
    __doc__ = torch.optim.NAdam.__doc__

    _op = "nadam_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            betas: tuple[float, float] = ...,
            eps: float = ...,
            weight_decay: float = ...,
            momentum_decay: float = ...,
            decoupled_weight_decay: bool = ...,
            *,
            foreach: bool | None = ...,
            maximize: bool = ...,
            capturable: bool = ...,
            differentiable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
