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

    def _state_keys_of(self, group: Group, p: Tensor) -> list[str]:
        return ["row_var", "col_var", "step"] if p.dim() > 1 else ["variance", "step"]

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        eps1, eps2 = self._values(group, "eps", 2)
        if eps1 is None:  # torch takes that of the first parameter for all of a group
            first = next((index for index, p in enumerate(group["params"]) if p.grad is not None), None)
            eps1 = 0.0 if first is None else torch.finfo(self._seen_dtype(group, first)).eps
        return super()._hypers({**group, "eps": (eps1, eps2)})
