"""Resilient backpropagation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.rprop import rprop as rprop

from optim_ext._step import FusedStep

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Rprop(FusedStep, torch.optim.Rprop):
    __doc__ = torch.optim.Rprop.__doc__

    _op = "rprop_"

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            etas: tuple[float, float] = ...,
            step_sizes: tuple[float, float] = ...,
            *,
            capturable: bool = ...,
            foreach: bool | None = ...,
            maximize: bool = ...,
            differentiable: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
