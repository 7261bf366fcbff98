"""Norms of whole tensors (LAMB, LARS, rules with norms) where a process has parts of them.

Each process measures its parts before anything is written; one collective for each process group adds the squares of all
norms; and every process steps its parts by the norms of the wholes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._load import _C


class WholeNorms:
    """What a step of parts asks for, once, on every process: how many numbers are added up, and over which process groups,
    follows from the parameters, not from which gradients there are here.

    Args:
        params: what this process steps of each parameter that is cut, and the DTensor that this is a part of.
    """

    def __init__(self, params: Sequence[tuple[Tensor, Any]]):
        self._params = {p for p, _ in params}
        specs = [whole._spec for _, whole in params]
        groups = [_sharding.sharding_groups(spec) for spec in specs]
        every = {group.group_name: group for of in groups for group in of}
        self.parts = _C.WholeParts([p for p, _ in params], [whole.numel() for _, whole in params])
        self._reduction = _sharding.Reduction([*groups, tuple(every.values())], _sharding.reduction_device(specs))
        self.has_asked = False  # in the step that is being taken

    def __contains__(self, p: Tensor) -> bool:
        return p in self._params

    def total(self, sums: Tensor, refused: bool) -> Tensor:
        """What all processes together have measured.

        Args:
            sums: squares of the norms of what this process has, float64 of shape (parameters + 1, norms); the last row is
                free.
            refused: this process does not take the step.

        Returns:
            Their sums, on the same device.

        Raises:
            RuntimeError: another process refuses the step. (A GPU is not waited for: there the others take it.)
        """
        self.has_asked = True
        sums[-1] = float(refused)
        totals = self._reduction.total(sums)
        if not refused and totals.device.type == "cpu" and totals[-1, 0] > 0:
            raise RuntimeError("another process of a group refuses this step; see the error there")
        return totals.to(sums.device)

    def refuse(self) -> None:
        """Let the others know, who wait."""
        self.total(torch.zeros(len(self._params) + 1, _C.MOST_NORMS, dtype=torch.float64), True)
