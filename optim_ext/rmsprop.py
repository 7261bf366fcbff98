"""RMSprop, plain, centered and with momentum."""

from __future__ import annotations

import torch
from torch.optim.rmsprop import rmsprop as rmsprop

from optim_ext._step import FusedStep, Group


class RMSprop(FusedStep, torch.optim.RMSprop):
    __doc__ = torch.optim.RMSprop.__doc__

    _op = "rmsprop_"

    def _state_keys(self, group: Group) -> tuple[str | None, ...]:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
            "step",
        )
