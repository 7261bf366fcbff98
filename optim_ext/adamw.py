"""Adam with decoupled weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.optim.adamw import adamw as adamw

from optim_ext.adam import Adam

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class AdamW(Adam, torch.optim.AdamW):
    __doc__ = torch.optim.AdamW.__doc__

    _op = "adamw_"

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
            maximize: bool = ...,
            foreach: bool | None = ...,
            capturable: bool = ...,
            differentiable: bool = ...,
            fused: bool | None = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...
