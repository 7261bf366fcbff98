"""RAdam: Adam with a rectified variance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.radam import radam as radam

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class RAdam(FusedStep, torch.optim.RAdam):
    __doc__ = torch.optim.RAdam.__doc__

    _op = "radam_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            betas: tuple[float, float] = ...,
            eps: float = ...,
            weight_decay: float = ...,
            decoupled_weight_decay: bool = ...,
            *,
            foreach: bool | None = ...,
            maximize: bool = ...,
            capturable: bool = ...,
            differentiable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
