"""Muon."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from optim_ext._step import FusedStep, Group

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT
    from typing_extensions import Unpack

    from optim_ext._constructor import AddedOptions


class Muon(FusedStep, torch.optim.Muon):
    __doc__ = torch.optim.Muon.__doc__

    _op = "muon_"
    _about_whole_tensors = True

    if TYPE_CHECKING:

        def __init__(
            self,
            params: ParamsT,
            lr: float = ...,
            weight_decay: float = ...,
            momentum: float = ...,
            nesterov: bool = ...,
            ns_coefficients: tuple[float, float, float] = ...,
            eps: float = ...,
            ns_steps: int = ...,
            adjust_lr_fn: str | None = ...,
            **added: Unpack[AddedOptions],
        ) -> None: ...

    def _hypers(self, group: Group) -> tuple[Any, ...]:
        options = {
            "ns_coefficients": self._values(group, "ns_coefficients", 3),
            "match_rms_adamw": group["adjust_lr_fn"] == "match_rms_adamw",
        }
        return super()._hypers({**group, **options})
