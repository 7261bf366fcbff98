"""Which code each parameter group of an optimizer runs, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer

from optim_ext._fused_step import FusedStep
from optim_ext.lbfgs import LBFGS


@dataclass(frozen=True)
class GroupReport:
    """The path of one parameter group: ``native`` kernels or torch's own code, and the reason."""

    group: int
    native: bool
    reason: str

    def __str__(self) -> str:
        return f"group {self.group}: {'native' if self.native else 'torch'} ({self.reason})"


def explain(optimizer: Optimizer) -> list[GroupReport]:
    """Say for each parameter group whether ``optimizer.step()`` would run natively or in torch's own code, and why.

    Judged from the options, parameters and gradients as they are now; nothing is changed. Parameters that require a
    gradient but have none yet are judged without it. Of a wrapper that holds an optimizer (accelerate's, ZeRO's), that
    one is judged.

    Example::

        >>> for report in optim_ext.explain(optimizer):
        ...     print(report)
        group 0: native (one call of optim_ext::adamw_ per device)
    """
    while not isinstance(optimizer, (FusedStep, LBFGS)):
        inner = getattr(optimizer, "optimizer", None) or getattr(optimizer, "optim", None)
        if not isinstance(inner, Optimizer):
            break
        optimizer = inner
    reports = []
    for index, group in enumerate(optimizer.param_groups):
        if not isinstance(optimizer, (FusedStep, LBFGS)):
            reports.append(GroupReport(index, False, f"{type(optimizer).__name__} has no native step in optim_ext"))
            continue
        reason = optimizer._torch_reason(group, ahead=True)
        reports.append(GroupReport(index, reason is None, reason or optimizer._native_how))
    return reports
