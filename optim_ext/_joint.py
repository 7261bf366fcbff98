"""One norm over the gradients of several optimizers, which then step one after the other.

Every optimizer learns of its gradients again when it steps: whether they are those the norm was taken of, and whether
GradScaler hands it a scale as it did the others. Where that is not so the norm is of nothing, and the step is refused.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from optim_ext import _grad_control
from optim_ext._grad_control import ArmedClip, GradPolicy, Verdict
from optim_ext._load import _C

if TYPE_CHECKING:
    from optim_ext._native_step import Controls
    from optim_ext._step.controls import ControlledStep

_UNSCALE_ALL = (
    "Take the norm once all backward passes are done; under GradScaler call scaler.unscale_(optimizer) for every "
    "optimizer before it"
)


class Round:
    """A norm of all gradients, until every optimizer has stepped by it."""

    def __init__(self, norm: Tensor, norm_type: float):
        self.norm, self.norm_type = norm, norm_type
        self.scaled: bool | None = None  # whether the steps are to unscale; None before the first

    def check(self, optimizer: ControlledStep, writes: int, own: Tensor | None, scaled: bool) -> None:
        """Raise where the norm is not that of this optimizer's gradients, whose part was ``own``, and the others'.

        A GradScaler that has just looked for infinities on the host, as it does where the optimizer is not fused, may have
        unscaled them without raising their versions: another norm tells. It has waited for the device already.
        """
        if _grad_control.changed(writes, scaled) or (
            own is not None
            and optimizer._asked().by_scaler
            and _differ(own, _grad_control.norm_of(optimizer, self.norm_type))
        ):
            raise RuntimeError(
                f"the gradients of {type(optimizer).__name__} were changed after a norm was taken of them and other "
                f"optimizers' together. {_UNSCALE_ALL}"
            )
        if self.scaled is not None and self.scaled != scaled:
            raise RuntimeError(
                "GradScaler has one of the optimizers that share a norm unscale in its step and another not, so the "
                f"norm is of both kinds of gradients. {_UNSCALE_ALL}"
            )


class Turn(NamedTuple):
    """An optimizer's part in a round."""

    round: Round
    marks: _C.GradMarks
    own: Tensor


class Sharing:
    """The optimizers that have one policy. They do not live on for it; copies of them join the copy of the policy."""

    def __init__(self, count: int):
        self.count = count
        self.members: list[tuple[weakref.ref[Controls], weakref.ref[ControlledStep]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"count": self.count, "members": []}

    def join(self, optimizer: ControlledStep) -> None:
        """Take part, or take the place of a wrapper with the same controls."""
        controls = optimizer._asked()
        place = next((i for i, (other, _) in enumerate(self.members) if other() is controls), len(self.members))
        self.members[place : place + 1] = [(weakref.ref(controls), weakref.ref(optimizer))]

    def leave(self, controls: Controls) -> None:
        self.members = [member for member in self.members if member[0]() is not controls]
        self.count -= 1

    def optimizers(self) -> list[ControlledStep]:
        found = [optimizer for _, of in self.members if (optimizer := of()) is not None]
        if len(found) != self.count:
            raise RuntimeError(
                f"{self.count} optimizers share this policy, but only {len(found)} of them are there: copy or load them "
                "together, or call share_grad_policy again with those that are left"
            )
        return found


def norm_of_all(optimizers: Sequence[ControlledStep], norm_type: float) -> tuple[Tensor, list[Tensor]]:
    """The norm of the norms, on the device of the first, and these."""
    norms = [_grad_control.norm_of(optimizer, norm_type) for optimizer in optimizers]
    here = [each.to(norms[0].device, non_blocking=norms[0].device.type != "cpu") for each in norms]
    return torch.ops.optim_ext.grad_norm(here, norm_type=norm_type)[0], norms


def _differ(norm: Tensor, other: Tensor) -> bool:
    return not torch.equal(norm, other) and not bool(norm.isnan() & other.isnan())


def arm_all(
    optimizers: Sequence[ControlledStep], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """Have the next step of each clip by the norm of all."""
    max_norm = _grad_control.checked_limit("max_norm", max_norm)
    norm_type = _grad_control.checked_norm_type(norm_type)
    for optimizer in optimizers:
        _grad_control.refuse_shared(optimizer.grad_policy)
        optimizer._ask().armed = None
    returned, parts = norm_of_all(optimizers, norm_type)
    if error_if_nonfinite:
        _grad_control.check_finite(returned, norm_type)
    # The norm of one number is that number. What is returned is unscaled by the first step; the others need the norm.
    norm, grad_factor, _ = torch.ops.optim_ext.grad_norm([returned], norm_type=math.inf, max_norm=max_norm)
    joint = Round(norm, norm_type)
    for optimizer, own in zip(optimizers, parts, strict=True):
        marks = _grad_control.marks_of(optimizer)
        optimizer._asked().armed = ArmedClip(max_norm, norm_type, norm, grad_factor, marks, returned, joint, own)
    return returned


def share(optimizers: Sequence[ControlledStep], policy: GradPolicy) -> None:
    policy._sharing = Sharing(len(optimizers))
    for optimizer in optimizers:
        optimizer._replace_policy(policy)
        policy._sharing.join(optimizer)


def judge_turn(
    optimizer: ControlledStep, policy: GradPolicy, grad_scale: Tensor | None, found_inf: Tensor | None
) -> Verdict:
    """What becomes of one step under a shared policy: the first one of a round takes the norm, and alone counts."""
    if torch.compiler.is_compiling():
        raise RuntimeError("a policy that optimizers share cannot be compiled into the step of one of them")
    sharing, controls, scaled = policy._sharing, optimizer._asked(), grad_scale is not None
    assert sharing is not None
    sharing.join(optimizer)
    turn = controls.turn
    if turn is not None:
        writes = turn.marks.writes_since(_grad_control.groups_of_grads(optimizer))
        if writes is None:  # a new backward pass: this round has gone by without a step
            turn = None
        else:
            turn.round.check(optimizer, writes, turn.own, scaled)
    turns: list[tuple[Controls, Turn]] = []
    if turn is None:
        members = sharing.optimizers()
        norm, parts = norm_of_all(members, policy.norm_type)
        joint = Round(norm, policy.norm_type)
        joint.scaled = scaled
        turns = [
            (other._asked(), Turn(joint, _grad_control.marks_of(other), own))
            for other, own in zip(members, parts, strict=True)
        ]
    else:
        joint = turn.round
    verdict = _grad_control.verdict_of_norm(joint.norm, policy, None, grad_scale, found_inf, counts=turn is None)
    return verdict._replace(turns=[(other, each) for other, each in turns if other is not controls], turn_of=controls)
