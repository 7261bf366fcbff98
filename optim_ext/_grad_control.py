"""Clipping, skipping and looking at gradients on the way into a step, without a pass of their own over them.

One native reduction gives the norm of all gradients and, on their device, what the step makes of it: a factor that the
update multiplies them by, and whether it is skipped. The gradients themselves are only read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim_ext import _sharding
from optim_ext._load import _C
from optim_ext._precision import values

if TYPE_CHECKING:
    from optim_ext._joint import Round, Sharing, Turn
    from optim_ext._native_step import Controls

NORM_TYPES = (1.0, 2.0, math.inf)


def zero() -> Tensor:
    """A count, on the CPU whatever the default device is: it moves to where it counts."""
    return torch.zeros((), dtype=torch.int64, device="cpu")


@dataclass
class GradPolicy:
    """What every step of an optimizer does about the norm of its gradients; made by ``set_grad_policy``, or
    for several optimizers by ``optim_ext.utils.share_grad_policy``.

    Attributes:
        max_norm: gradients enter the update multiplied by ``max_norm / (norm + 1e-6)`` where that is below one.
        norm_type: 1, 2 or inf.
        skip_nonfinite: no step where the norm is infinite or NaN.
        skip_above: no step unless the norm is at most this.
        last_norm: the norm at the last step, of unscaled gradients: float32 (float64 if there are float64 gradients),
            shape (), on the device of the gradients. None before the first step.
        last_step_skipped: whether the last step was skipped: bool, shape (). None before the first step.
        skipped_steps: how many steps were skipped since the policy was set: int64, shape ().

    The tensors live where the gradients do; reading one with ``item()`` is what waits for the device, nothing else does.
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    skip_nonfinite: bool = False
    skip_above: float | None = None
    last_norm: Tensor | None = field(default=None, init=False, repr=False)
    skipped_steps: Tensor = field(default_factory=zero, init=False, repr=False)
    _last_skip: Tensor | None = field(default=None, init=False, repr=False)
    _sharing: Sharing | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.norm_type = checked_norm_type(self.norm_type)
        self.max_norm = None if self.max_norm is None else checked_limit("max_norm", self.max_norm)
        self.skip_above = None if self.skip_above is None else checked_limit("skip_above", self.skip_above)

    @property
    def last_step_skipped(self) -> Tensor | None:
        return None if self._last_skip is None else self._last_skip != 0


class ArmedClip(NamedTuple):
    """A norm already taken, for the next step to use."""

    max_norm: float
    norm_type: float
    norm: Tensor
    grad_factor: Tensor
    marks: _C.GradMarks  # of the gradients whose norm it is
    returned: Tensor  # to the caller; of unscaled gradients once that norm is known
    joint: Round | None = None  # with other optimizers
    own: Tensor | None = None  # this optimizer's part of that
    process_group: Any = None  # of processes whose gradients belong to the norm
    of_more: bool = False  # the norm is of parameters, too, that have been dropped since


class StepControls(NamedTuple):
    """What one step is told besides its options, as the native code takes it: GradScaler's scale, whether to skip (one
    that is 1), a factor of the gradients, and the weight of the parameters in their averages."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_factor: Tensor | None = None
    average_weight: float | Tensor | None = None


class NonFinite(NamedTuple):
    """A parameter that is not all finite, and how many elements of its gradient and value are not. ``parameter`` is its
    name, a key of ``named_parameters()``, where the optimizer was given names, else its place ("parameter 0 of group 1").
    """

    parameter: str
    grad: int
    value: int

    def __str__(self) -> str:
        return f"{self.parameter}: {self.grad} non-finite in the gradient, {self.value} in the value"


class GroupNorms(NamedTuple):
    """Euclidean norms of one parameter group: of its gradients, of its parameters after the step, and of what the step
    changed. float64 tensors of shape ()."""

    grad: Tensor
    param: Tensor
    update: Tensor


def checked_limit(name: str, value: float) -> float:
    value = float(value)
    if not value >= 0.0:  # true for NaN too
        raise ValueError(f"{name} must be at least 0, found {value}")
    return value


def checked_norm_type(norm_type: float) -> float:
    norm_type = float(norm_type)
    if norm_type not in NORM_TYPES:
        raise ValueError(
            f"norm_type must be 1, 2 or inf, found {norm_type}; torch.nn.utils.clip_grad_norm_ takes any other"
        )
    return norm_type


def check_finite(norm: Tensor, norm_type: float) -> None:
    """Raise torch's error for a norm that is not finite. Waits for the device."""
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is non-finite, so it cannot be "
            "clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


def norm_of(optimizer: Optimizer, norm_type: float) -> Tensor:
    """The norm of an optimizer's gradients, scaled or not."""
    with seen_locally(optimizer):
        return grad_norm(optimizer, norm_type)[0]


def grad_norm(
    optimizer: Any, norm_type: float, process_group: Any = None, **rules: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of an optimizer's gradients, the factor and whether to skip. Where parameters are DTensors their local
    tensors are seen, and the norm is that of all processes' parts; the collectives for it are joined by all of these.
    ``process_group``: whose processes have other gradients each, which belong to the norm."""
    view = getattr(optimizer, "_viewing", None)
    if process_group is None:
        _refuse_flat_shards(optimizer)
        if view is None:
            return _C.grad_norm(optimizer.param_groups, norm_type, **rules)
        norm = view.norm(norm_type)
    else:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        spread = _sharding.SpreadNorm([(p, ()) for p in params], _device_of_grads(optimizer)) if view is None else view
        norm = spread.norm(norm_type, process_group)
    # The norm of one number is that number.
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.optim_ext.grad_norm([norm], norm_type=math.inf, **rules)
    return found


def seen_locally(optimizer: Any) -> AbstractContextManager[object]:
    """Within the block an optimizer of this package has this process's parts of parameters and gradients."""
    seen: Any = getattr(optimizer, "_seen_locally", nullcontext)
    return seen()  # type: ignore[no-any-return]


def marks_of(optimizer: Any) -> _C.GradMarks:
    """Which gradients a norm is of."""
    return _C.GradMarks(groups_of_grads(optimizer))


def groups_of_grads(optimizer: Any) -> Any:
    """The groups with gradients as users know them, and write them: DTensors count their writes, not their parts."""
    return optimizer.param_groups if getattr(optimizer, "_viewing", None) is None else optimizer._viewing.whole_groups


def arm(
    optimizer: Any, max_norm: float, norm_type: float, error_if_nonfinite: bool, process_group: Any = None
) -> ArmedClip:
    """Take the norm of an optimizer's gradients and the factor that clips them."""
    max_norm, norm_type = checked_limit("max_norm", max_norm), checked_norm_type(norm_type)
    refuse_shared(optimizer.grad_policy)
    with seen_locally(optimizer):
        norm, grad_factor, _ = grad_norm(optimizer, norm_type, process_group, max_norm=max_norm)
    if error_if_nonfinite:
        check_finite(norm, norm_type)
    marks = marks_of(optimizer)
    return ArmedClip(max_norm, norm_type, norm, grad_factor, marks, norm, process_group=process_group)


def refuse_shared(policy: GradPolicy | None) -> None:
    if policy is not None and policy._sharing is not None:
        raise RuntimeError(
            "this optimizer shares a policy with others, which takes the norm for all of them: set max_norm there "
            "(share_grad_policy), or end it with set_grad_policy()"
        )


def changed(writes: int, scaled: bool) -> bool:
    """Whether gradients have other values than when they were marked. GradScaler's search for infinities before a fused
    step, which comes with a scale, counts as one write and changes nothing."""
    return writes != (1 if scaled else 0) and writes != 0


class Verdict(NamedTuple):
    """What one step is told of its gradients; the policy learns of it once the step has succeeded."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    grad_factor: Tensor | None = None
    policy: GradPolicy | None = None
    norm: Tensor | None = None
    skip: Tensor | None = None
    armed: ArmedClip | None = None
    counts: bool = True  # among the policy's skipped steps
    turn_of: Controls | None = None  # whose turn it is, under a policy that optimizers share
    turns: Sequence[tuple[Controls, Turn]] = ()  # what the others of this round are told

    @property
    def controls(self) -> StepControls:
        return StepControls(self.grad_scale, self.found_inf, self.grad_factor)

    def record(self) -> None:
        if self.policy is not None:
            self.policy.last_norm, self.policy._last_skip = self.norm, self.skip
        if self.armed is not None and self.norm is not None:  # of unscaled gradients, now that it is known
            self.armed.returned.copy_(self.norm)
        if self.armed is not None and self.armed.joint is not None:
            self.armed.joint.scaled = self.grad_scale is not None
        if self.turn_of is not None:
            self.turn_of.turn = None
        for controls, turn in self.turns:
            controls.turn = turn

    def take_back(self) -> None:
        """The step has failed: it was not skipped, then."""
        if self.policy is not None and self.skip is not None and self.counts:
            self.policy.skipped_steps.sub_(self.skip.long())


def judge(
    optimizer: Any,
    armed: ArmedClip | None,
    policy: GradPolicy | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Verdict:
    """What becomes of one step, from a norm that was taken before (``armed``) or is taken now for a standing policy.

    ``grad_scale`` and ``found_inf`` are what GradScaler left on a fused optimizer. A norm taken before is that of the
    gradients it saw: if none of them is there any more, it is void. If they have been written since (GradScaler unscales
    them within its own step() where the optimizer is not fused), it is taken again.
    """
    again = False
    if armed is not None:
        writes = armed.marks.writes_since(groups_of_grads(optimizer))
        if writes is None:
            armed = None
        else:
            again = changed(writes, grad_scale is not None) or optimizer._asked().by_scaler or armed.of_more
            if armed.joint is not None:
                armed.joint.check(optimizer, writes, armed.own, grad_scale is not None)
                again = False
    if armed is None and policy is None:
        return Verdict(grad_scale, found_inf)
    if armed is not None and not again:
        if policy is None and grad_scale is None:
            return Verdict(None, found_inf, armed.grad_factor, armed=armed)
        return verdict_of_norm(armed.norm, policy, armed, grad_scale, found_inf)
    return verdict_of_norm(optimizer, policy, armed, grad_scale, found_inf)


def verdict_of_norm(
    source: Tensor | Optimizer,
    policy: GradPolicy | None,
    armed: ArmedClip | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    counts: bool = True,
) -> Verdict:
    """The verdict on a norm that was taken before, of scaled gradients if there is a scale (GradScaler hands its scale to
    step() alone), or on the norm of the gradients of an optimizer, taken here."""
    device = source.device if isinstance(source, Tensor) else _device_of_grads(source)
    limits = armed or policy
    assert limits is not None
    rules: dict[str, Any] = {
        "max_norm": limits.max_norm,
        "grad_scale": _moved(grad_scale, device),
        "found_inf": _moved(found_inf, device),
    }
    if policy is not None:
        policy.skipped_steps = policy.skipped_steps.to(device, non_blocking=device.type != "cpu")
        rules |= {
            "skip_nonfinite": policy.skip_nonfinite,
            "skip_above": policy.skip_above,
            "skips": policy.skipped_steps if counts else None,
        }
    if isinstance(source, Tensor):
        # The norm of one number is that number.
        norm, grad_factor, skip = torch.ops.optim_ext.grad_norm([source], norm_type=math.inf, **rules)
    elif torch.compiler.is_compiling():
        grads = [p.grad for group in source.param_groups for p in group["params"] if p.grad is not None]
        norm, grad_factor, skip = torch.ops.optim_ext.grad_norm(grads, norm_type=limits.norm_type, **rules)
    else:
        process_group = None if armed is None else armed.process_group
        norm, grad_factor, skip = grad_norm(source, limits.norm_type, process_group, **rules)
    may_skip = found_inf is not None or (
        policy is not None and (policy.skip_nonfinite or policy.skip_above is not None)
    )
    told = (skip if may_skip else None, grad_factor if limits.max_norm is not None else None)
    return Verdict(grad_scale, *told, policy, norm, skip, armed, counts)


def is_flat_shard(p: Tensor) -> bool:
    """Whether FullyShardedDataParallel has cut this parameter up. It leaves ordinary tensors with a mark."""
    return getattr(p, "_fsdp_flattened", False) is True


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor: by its class, as a compiler does not see such an attribute of the tensor itself."""
    return hasattr(type(tensor), "to_local")


def _refuse_flat_shards(optimizer: Optimizer) -> None:
    """Raise where a process has parts of gradients only, whose norm would be another one on each process."""
    plan = getattr(optimizer, "_plan", None)
    if plan is not None and not plan.of_shards:  # parameters were looked at when it was made
        return
    if any(is_flat_shard(p) for group in optimizer.param_groups for p in group["params"]):
        raise RuntimeError(
            "the gradients are shards of FullyShardedDataParallel, and no process knows their norm: clip with the "
            "model's own clip_grad_norm_(), or by clip_grad_norm(process_group=) of those that have the other shards"
        )


def _moved(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=device.type != "cpu")


def _device_of_grads(optimizer: Any) -> torch.device:
    view = getattr(optimizer, "_viewing", None)
    if view is not None:  # the same on processes that have no gradient
        return view.device  # type: ignore[no-any-return]
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                device: torch.device = p.grad.device
                return device
    return torch.device("cpu")


def find_nonfinite(optimizer: Optimizer) -> list[NonFinite]:
    """The parameters of an optimizer whose gradient or value is not finite, with counts, in the order of the groups. Of
    sharded ones this process's part counts."""
    found = []
    for index, group in enumerate(optimizer.param_groups):
        params, names = list(group["params"]), group.get("param_names")
        for place, grad, value in _nonfinite_among(params):
            name = str(names[place]) if names else _C.describe(optimizer.param_groups, index, place)
            found.append(NonFinite(name, grad, value))
    return found


def find_nonfinite_params(params: Iterable[Tensor | tuple[str, Tensor]]) -> list[NonFinite]:
    """The same of parameters, with their names where they come with them."""
    named = [given if isinstance(given, tuple) else (f"parameter {place}", given) for place, given in enumerate(params)]
    return [NonFinite(named[place][0], grad, value) for place, grad, value in _nonfinite_among([p for _, p in named])]


def _nonfinite_among(params: list[Tensor]) -> Iterator[tuple[int, int, int]]:
    """The places of parameters that are not all finite, with the counts of their gradients and values."""
    values, grads = _count(list(params)), _count([p.grad for p in params])
    for place, (grad, value) in enumerate(zip(grads, values, strict=True)):
        if grad or value:
            yield place, grad, value


def _count(tensors: list[Tensor | None]) -> list[int]:
    """How many elements of each tensor are not finite, none for None. One wait per device."""
    counts = [0] * len(tensors)
    for places, of_device in _by_device(tensors):
        counted = torch.ops.optim_ext.count_nonfinite(of_device).tolist()
        for place, count in zip(places, counted, strict=True):
            counts[place] = count
    return counts


def _by_device(tensors: Sequence[Tensor | None]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The tensors that are there, without autograd, with their places, one list per device."""
    devices: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None:
            places, of_device = devices.setdefault(tensor.device, ([], []))
            here: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
            places.append(place)
            of_device.append(here.detach().to_dense() if here.is_sparse else here.detach())
    return iter(devices.values())


def _norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """The Euclidean norm of all tensors together, in float64 of shape ()."""
    norms = [torch.ops.optim_ext.norms(of_device) for _, of_device in _by_device(tensors)]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    total: Tensor = torch.linalg.vector_norm(torch.cat([each.to(norms[0].device) for each in norms]))
    return total


def _measured(optimizer: Optimizer, p: Tensor) -> Tensor:
    """What a step moves: this process's part of a parameter, together with what is kept beside it."""
    entry = getattr(optimizer, "state", {}).get(p)
    if isinstance(entry, Mapping) and values.has_twin(p, entry):
        return values.param_value(p, entry)
    return _sharding.local(p)


@contextmanager
def measure_step(optimizer: Optimizer) -> Iterator[list[GroupNorms]]:
    """Norms of gradient, parameter and update of each group, for the steps taken inside."""
    _refuse_flat_shards(optimizer)
    before = [[_measured(optimizer, p).clone() for p in group["params"]] for group in optimizer.param_groups]
    measured: list[GroupNorms] = []
    yield measured
    for group, old_values in zip(optimizer.param_groups, before, strict=True):
        now = [_measured(optimizer, p) for p in group["params"]]
        updates = [value - old for value, old in zip(now, old_values, strict=True)]
        grads = _sharding.local_grads(group["params"])
        norm: Callable[[Sequence[Tensor | None]], Tensor] = _norm
        if _sharding.holds_dtensors([group]):
            norm = functools.partial(_sharding.norm_of_parts, group["params"])
        measured.append(GroupNorms(grad=norm(grads), param=norm(now), update=norm(updates)))
