"""RMSprop, plain, centered and with momentum."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.rmsprop import rmsprop as rmsprop

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class RMSprop(FusedStep, torch.optim.RMSprop):
    __doc__ = torch.optim.RMSprop.__doc__

    _op = "rmsprop_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            alpha: float = ...,
            eps: float = ...,
            weight_decay: float = ...,
            momentum: float = ...,
            centered: bool = ...,
            capturable: bool = ...,
            foreach: bool | None = ...,
            maximize: bool = ...,
            differentiable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
            "step",
        )
