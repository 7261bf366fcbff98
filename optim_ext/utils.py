"""Native equals of ``torch.nn.utils``' gradient clipping, for training loops that keep their own, and clipping of several
optimizers by one norm (``clip_optimizers``, ``share_grad_policy``). ``find_nonfinite`` and ``measure_step`` look at any
optimizer, this package's or not.

``clip_grad_norm_``, ``clip_grad_value_`` and ``get_total_norm`` take the same arguments as torch's, return the same and change the gradients in place. One pass reads the gradients for the
norm and one scales them; an optimizer's ``clip_grad_norm`` saves the second. What the kernels do not cover (norm types
other than 1, 2 and inf, sparse gradients, tensor subclasses other than DTensor, other devices, a gradient that is there
twice) goes to torch's own function. ``foreach`` chooses between torch's implementations and changes nothing here.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from optim_ext import _grad_control, _joint, _sharding
from optim_ext._grad_control import NORM_TYPES, GradPolicy, GroupNorms, NonFinite, check_finite, checked_limit
from optim_ext._load import _C
from optim_ext._step import FusedStep

__all__ = [
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_optimizers",
    "find_nonfinite",
    "get_total_norm",
    "measure_step",
    "share_grad_policy",
]


@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors together, viewed as one vector: ``torch.nn.utils.get_total_norm``.

    Args:
        tensors: one or any number of them, which are only read. Shapes, devices and dtypes (float32, float64, bfloat16,
            float16, complex) may differ.
        norm_type: 1, 2 or inf; others go to torch's function.
        error_if_nonfinite: raise where the norm is infinite or NaN (reads the norm on the host).
        foreach: passed on where torch's function is called, else without effect.

    Returns:
        shape (), in the dtype the tensors promote to, on the device of the first; 0 if there are none.

    Raises:
        RuntimeError: the norm is infinite or NaN and ``error_if_nonfinite`` is set.
    """
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if _native_parts(tensors, tensors, norm_type):
        parts = [_sharding.local(tensor) for tensor in tensors]
        total = _sharding.norm_of_parts(tensors, parts, float(norm_type)).to(_promoted(tensors))
        if error_if_nonfinite:
            check_finite(total, float(norm_type))
        return total
    if not _native(tensors, norm_type):
        return torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
    norm = _total_norm(tensors, float(norm_type))
    if error_if_nonfinite:
        check_finite(norm, float(norm_type))
    return norm.to(_promoted(tensors))


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale gradients in place so that their norm is at most ``max_norm``: ``torch.nn.utils.clip_grad_norm_``.

    Args:
        parameters: one or any number of them, whose ``grad`` is scaled; shapes, devices and dtypes as in
            :func:`get_total_norm`. Those without a gradient are passed over.
        max_norm: the largest norm allowed, at least 0. The factor is ``max_norm / (norm + 1e-6)``, at most 1.
        norm_type: 1, 2 or inf; others go to torch's function.
        error_if_nonfinite: raise where the norm is infinite or NaN (reads the norm on the host), before anything is
            written.
        foreach: passed on where torch's function is called, else without effect.

    Returns:
        The norm before that, as ``get_total_norm``.

    Raises:
        ValueError: ``max_norm`` is negative or NaN.
        RuntimeError: the norm is infinite or NaN and ``error_if_nonfinite`` is set.
    """
    max_norm = checked_limit("max_norm", max_norm)
    is_generator = isinstance(parameters, Generator)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if is_generator and not parameters:
        # Another one, of which torch warns.
        return torch.nn.utils.clip_grad_norm_((p for p in parameters), max_norm, norm_type, error_if_nonfinite, foreach)
    grads = [p.grad for p in parameters if p.grad is not None]
    if _native_parts(parameters, grads, norm_type):
        return _clip_parts(parameters, grads, max_norm, float(norm_type), error_if_nonfinite)
    if not _native(grads, norm_type) or _repeats(grads):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    norm_type = float(norm_type)
    norm = _total_norm(grads, norm_type)
    if error_if_nonfinite:
        check_finite(norm, norm_type)
    # The norm of one number is that number: what is wanted of this call is the factor.
    _, factor, _ = torch.ops.optim_ext.grad_norm([norm], norm_type=torch.inf, max_norm=max_norm)
    for of_device in _by_device(grads):
        torch.ops.optim_ext.clip_(of_device, factor=factor.to(of_device[0].device))
    return norm.to(_promoted(grads))


@torch.no_grad()
def clip_grad_value_(parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Bring every element of the gradients into [-clip_value, clip_value], in place: ``torch.nn.utils.clip_grad_value_``.

    Args:
        parameters: one or any number of them, whose ``grad`` is changed: real ones of any shape and floating dtype.
            Those without a gradient are passed over.
        clip_value: the largest magnitude allowed, at least 0.
        foreach: passed on where torch's function is called, else without effect.

    Raises:
        ValueError: ``clip_value`` is negative or NaN.
        NotImplementedError: a gradient is complex (torch's error).
    """
    clip_value = checked_limit("clip_value", clip_value)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    if _native_parts(grads, grads, 2.0):
        grads = [_sharding.local(grad) for grad in grads]
    if (
        not _native(grads, 2.0) or _repeats(grads) or any(grad.is_complex() for grad in grads)
    ):  # torch says why complex has no order
        torch.nn.utils.clip_grad_value_(parameters, clip_value, foreach)
        return
    for of_device in _by_device(grads):
        torch.ops.optim_ext.clip_(of_device, limit=clip_value)


def clip_optimizers(
    optimizers: Iterable[Optimizer], max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """Clip the next step of several optimizers by the norm of all their gradients together.

    As ``optimizer.clip_grad_norm``, for models that have Muon for their matrices and AdamW for the rest, say: the factor
    ``max_norm / (norm + 1e-6)``, at most one, is applied inside the next ``step()`` of each. Call it after all backward
    passes and, under ``GradScaler``, after ``scaler.unscale_`` of each of them (or have all of them ``fused=True``, which
    unscales in the steps).

    Args:
        optimizers: optimizers of this package with native steps, without a parameter in common.
        max_norm: the largest norm allowed, at least 0.
        norm_type: 1, 2 or inf.
        error_if_nonfinite: raise where the norm is infinite or NaN (reads the norm on the host).

    Returns:
        The norm, as ``optimizer.clip_grad_norm``, on the device of the first optimizer's gradients.

    Raises:
        TypeError: one of them is no such optimizer.
        ValueError: ``max_norm`` is negative or NaN, another ``norm_type``, no optimizer, or a parameter that two have.
        RuntimeError: as ``optimizer.clip_grad_norm``. ``step()`` raises it where the gradients have been written since,
            by ``scaler.step`` for instance, which unscales those of one optimizer only.

    Example::

        optim_ext.utils.clip_optimizers([muon, adamw], 1.0)
        muon.step()
        adamw.step()
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "clip_optimizers cannot be compiled: norms are remembered for the steps outside of the graph"
        )
    return _joint.arm_all(_several(optimizers), max_norm, norm_type, error_if_nonfinite)


def share_grad_policy(
    optimizers: Iterable[Optimizer],
    *,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    skip_nonfinite: bool = False,
    skip_above: float | None = None,
) -> GradPolicy:
    """Give several optimizers of a model one policy: they clip by one norm, and are skipped together.

    As ``optimizer.set_grad_policy``. The first of them to step takes the norm over the gradients of all, which have to be
    there by then, and the others use it in turn; a gradient that was written in between is an error. Under ``GradScaler``
    call ``scaler.unscale_`` of each before the first step, or have all of them ``fused=True``. ``skipped_steps`` counts
    what the first one decides. ``set_grad_policy`` on one of them ends its part. Copies and pickles keep the policy if all
    of them are copied together; otherwise the next step raises an error.

    Args:
        optimizers: optimizers of this package with native steps, without a parameter in common.
        max_norm: gradients enter the updates multiplied by ``max_norm / (norm + 1e-6)`` where that is below one.
        norm_type: 1, 2 or inf.
        skip_nonfinite: skip the steps of all where the norm is infinite or NaN.
        skip_above: skip the steps of all unless the norm is at most this.

    Returns:
        The policy, also as ``grad_policy`` of each.

    Raises:
        TypeError: one of them is no such optimizer.
        ValueError: a limit is negative or NaN, another ``norm_type``, no limit, no optimizer, or a parameter that two
            have.
    """
    if max_norm is None and not skip_nonfinite and skip_above is None:
        raise ValueError("a policy needs max_norm, skip_nonfinite or skip_above")
    policy = GradPolicy(max_norm, norm_type, skip_nonfinite, skip_above)
    _joint.share(_several(optimizers), policy)
    return policy


def find_nonfinite(optimizer_or_params: Optimizer | Iterable[Tensor | tuple[str, Tensor]]) -> list[NonFinite]:
    """Name the parameters whose gradient or value is not finite, with counts (of parts, for complex numbers; of this
    process's part, for sharded parameters).

    For any optimizer, also a subclass of ``torch.optim.Optimizer`` in Python or a wrapper with ``param_groups``; those of
    this package have it as a method. Reads everything, and waits for the device.

    Args:
        optimizer_or_params: an optimizer, a model's ``parameters()`` or ``named_parameters()``, or one tensor. Tensors of
            any shape and of the dtypes float32, float64, bfloat16, float16 and complex.

    Returns:
        One entry for each such parameter, in order; none if all are finite.

    Raises:
        TypeError: what was given is neither, or holds what is no tensor.
    """
    given: Any = optimizer_or_params
    if hasattr(given, "param_groups"):
        return _grad_control.find_nonfinite(given)
    if isinstance(given, Tensor):
        given = [given]
    if not isinstance(given, Iterable):
        raise TypeError(f"find_nonfinite takes an optimizer or parameters, found {type(given).__name__}")
    params = list(given)
    for place, p in enumerate(params):
        if not isinstance(p[1] if isinstance(p, tuple) and len(p) == 2 else p, Tensor):
            raise TypeError(f"parameter {place} is {type(p).__name__}, expected a tensor, or its name and the tensor")
    return _grad_control.find_nonfinite_params(params)


def measure_step(optimizer: Optimizer) -> AbstractContextManager[list[GroupNorms]]:
    """Norms of gradient, parameter and update of each group for a step taken inside, there when it ends::

        with optim_ext.utils.measure_step(optimizer) as norms:
            optimizer.step()
        print(norms[0].update / norms[0].param)

    For any optimizer; those of this package have it as a method. Keeps a copy of all parameters meanwhile.

    Args:
        optimizer: anything with ``param_groups``.

    Returns:
        A context manager that gives a list, which is filled at its end: one :class:`optim_ext.GroupNorms` for each group.

    Raises:
        TypeError: it is no optimizer.
        RuntimeError: parameters are FullyShardedDataParallel's shards.
    """
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(f"measure_step takes an optimizer, found {type(optimizer).__name__}")
    return _grad_control.measure_step(optimizer)


def _several(optimizers: Iterable[Optimizer]) -> list[FusedStep]:
    """Optimizers whose gradients make one norm."""
    several: list[FusedStep] = []
    owners: dict[Tensor, int] = {}
    for place, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, FusedStep):
            why = getattr(optimizer, "_no_joint_norm", None)
            raise TypeError(
                f"optimizer {place} is {type(optimizer).__name__}, expected one of optim_ext's with native steps"
                + (f": {why}" if why else "")
            )
        several.append(optimizer)
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                if owners.setdefault(p, place) != place:
                    raise ValueError(
                        f"{optimizer._described(group, i)} of optimizer {place} is in optimizer {owners[p]}, too: its "
                        "gradient would count twice"
                    )
    if not several:
        raise ValueError("expected at least one optimizer")
    return several


def _native_parts(wholes: list[Any], grads: list[Any], norm_type: float) -> bool:
    """Whether there are DTensors whose local tensors the kernels cover. A sum that has not been made is torch's to make
    where there is no parameter whose layout it could be given."""
    if not any(map(_sharding.is_dtensor, wholes)) or float(norm_type) not in NORM_TYPES or _repeats(grads):
        return False
    specs = [whole._spec for whole in wholes if _sharding.is_dtensor(whole)]
    parts = [_sharding.local_part(grad) if _sharding.is_dtensor(grad) else grad for grad in grads]
    return not any(map(_sharding.is_partial, specs)) and all(
        part is not None and _C.unsupported(part) is None for part in parts
    )


def _clip_parts(
    params: list[Any], grads: list[Any], max_norm: float, norm_type: float, error_if_nonfinite: bool
) -> Tensor:
    """The same of DTensors: each process scales its own parts, by one norm."""
    promoted = _promoted(grads or params)
    norm = _sharding.norm_of_parts(params, _sharding.local_grads(params), norm_type)
    norm = norm.to(torch.float64 if promoted == torch.float64 else torch.float32)
    if error_if_nonfinite:
        check_finite(norm, norm_type)
    if grads:
        _, factor, _ = torch.ops.optim_ext.grad_norm([norm], norm_type=torch.inf, max_norm=max_norm)
        for of_device in _by_device([_sharding.local(grad) for grad in grads]):
            torch.ops.optim_ext.clip_(of_device, factor=factor.to(of_device[0].device))
    return norm.to(promoted)


def _native(tensors: list[Tensor], norm_type: float) -> bool:
    """Whether the kernels cover this; torch's own function is asked otherwise, also where there is nothing to do."""
    return (
        len(tensors) > 0
        and float(norm_type) in NORM_TYPES
        and all(_C.unsupported(tensor) is None for tensor in tensors)
    )


def _repeats(tensors: list[Tensor]) -> bool:
    """Whether a tensor is there more than once; torch then changes it as often."""
    return len({id(tensor) for tensor in tensors}) != len(tensors)


def _by_device(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    devices: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        devices.setdefault(tensor.device, []).append(tensor)
    return devices.values()


def _total_norm(tensors: list[Tensor], norm_type: float) -> Tensor:
    """float32, or float64 if there is any; over several devices the norm of their norms, on the first."""
    norms = [
        torch.ops.optim_ext.grad_norm(of_device, norm_type=norm_type)[0].to(tensors[0].device)
        for of_device in _by_device(tensors)
    ]
    norm: Tensor = norms[0] if len(norms) == 1 else torch.ops.optim_ext.grad_norm(norms, norm_type=norm_type)[0]
    return norm


def _promoted(tensors: list[Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype.to_real() for tensor in tensors}
    promoted = dtypes.pop()
    for dtype in dtypes:
        promoted = torch.promote_types(promoted, dtype)
    return promoted
