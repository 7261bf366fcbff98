"""Adafactor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Adafactor(FusedStep, torch.optim.Adafactor):
    __doc__ = torch.optim.Adafactor.__doc__

    _op = "adafactor_"
    _about_whole_tensors = True

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float | Tensor = ...,
            beta2_decay: float = ...,
            eps: tuple[float | None, float] = ...,
            d: float = ...,
            weight_decay: float = ...,
            *,
            foreach: bool | None = ...,
            maximize: bool = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        eps1, eps2 = self._values(group, "eps", 2)
        if eps1 is None:  # torch takes that of the first parameter for all of a group
            eps1 = next((torch.finfo(p.dtype).eps for p in group["params"] if p.grad is not None), 0.0)
        return super()._hypers({**group, "eps": (eps1, eps2)})
