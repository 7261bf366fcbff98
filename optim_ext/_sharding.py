"""DTensors: how they are laid out, what this process has of them, and sums over the processes that share them.

The engine is torch.distributed; nothing here moves a parameter. Which collectives there are, and in which order, depends
on layouts alone, which all processes know, and never on values or on which gradients happen to be there.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim_ext._load import _C

# The process groups that hold different parts of a tensor: empty where every process has all of it.
Groups = tuple[Any, ...]


def dtensor_type() -> Any:
    """DTensor, or None in a process that cannot have one: it is not imported for the sake of asking."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(tensor: Any) -> bool:
    return type(tensor) is dtensor_type()


def holds_dtensors(param_groups: Iterable[Mapping[str, Any]]) -> bool:
    """Whether a parameter is a DTensor. (A subclass of it has operations of its own, like any other subclass.)"""
    kind = dtensor_type()
    return kind is not None and bool(_C.any_of_type(param_groups, kind))


def local_part(dtensor: Any) -> Tensor | None:
    """The tensor this process has of a DTensor; None where that has operations of its own (quantised, Float8).

    One that a collective is still writing is waited for, once.
    """
    local: Tensor | Any = dtensor._local_tensor
    if hasattr(local, "trigger_wait"):  # AsyncCollectiveTensor
        local = dtensor._local_tensor = local.trigger_wait()
    is_plain = type(local) in (Tensor, torch.nn.Parameter) and not local.is_inference()
    found: Tensor | None = local if is_plain else None
    return found


def is_alike(spec: Any, other: Any) -> bool:
    """Whether tensors with these layouts have the same shape and lie on the processes in the same way."""
    return spec is other or (
        spec.mesh == other.mesh
        and spec.placements == other.placements
        and spec.tensor_meta.shape == other.tensor_meta.shape
        and getattr(spec, "shard_order", None) == getattr(other, "shard_order", None)
    )


def are_alike(tensor: Any, other: Any) -> bool:
    """Whether both are plain, or DTensors with the same layout."""
    if is_dtensor(tensor) and is_dtensor(other):
        return is_alike(tensor._spec, other._spec)
    return is_dtensor(tensor) == is_dtensor(other)


def is_partial(spec: Any) -> bool:
    return any(place.is_partial() for place in spec.placements)


def refuse_partial(spec: Any, name: str) -> None:
    """Raises RuntimeError where a parameter is a sum that has not been made (Partial), which nobody can step."""
    if is_partial(spec):
        raise RuntimeError(
            f"{name} is a sum that has not been made: it has {described(spec)}; redistribute it to Shard or Replicate before "
            "it is given to an optimizer"
        )


def sharding_groups(spec: Any) -> Groups:
    """The process groups over which a tensor is cut into parts. Copies on other processes do not count."""
    mesh = spec.mesh
    if mesh.get_coordinate() is None:  # this process has no part in it
        return ()
    cut = (dim for dim, place in enumerate(spec.placements) if not place.is_replicate() and mesh.size(dim) > 1)
    return tuple(mesh.get_group(dim) for dim in cut)


def mesh_groups(spec: Any) -> Groups:
    """The process groups of a mesh, in which all processes that have a part or a copy meet."""
    mesh = spec.mesh
    if mesh.get_coordinate() is None:
        return ()
    return tuple(mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1)


def shard_counts(spec: Any) -> list[int]:
    """Into how many parts each dimension of the mesh cuts a tensor."""
    return [spec.mesh.size(dim) for dim, place in enumerate(spec.placements) if not place.is_replicate()]


def is_cut(spec: Any) -> bool:
    """Whether some process has a part of the tensor only."""
    return any(count > 1 for count in shard_counts(spec))


def described(spec: Any) -> str:
    return f"placements {tuple(spec.placements)} on a mesh of shape {tuple(spec.mesh.shape)}"


def wrapped(local: Tensor, like: Any) -> Any:
    """A DTensor whose part of this process is ``local``, itself: laid out as the DTensor ``like``, of its own dtype."""
    spec = like._spec
    if local.dtype != spec.tensor_meta.dtype:
        spec = type(spec)(spec.mesh, spec.placements, tensor_meta=spec.tensor_meta._replace(dtype=local.dtype))
    return type(like)(local, spec, requires_grad=False)


def wrapped_copy(local: Tensor, like: Any) -> Any:
    """A DTensor on the mesh of the DTensor ``like``, of which every process has the whole, ``local`` itself."""
    spec, replicate = like._spec, sys.modules["torch.distributed.tensor"].Replicate
    meta = type(spec.tensor_meta)(local.shape, local.stride(), local.dtype)
    spec = type(spec)(spec.mesh, (replicate(),) * spec.mesh.ndim, tensor_meta=meta)
    return type(like)(local, spec, requires_grad=False)


def wrapped_rows(local: Tensor, like: Any) -> Any:
    """A vector of which each process of the mesh of the DTensor ``like`` has a part as long as ``local``, itself this one's."""
    spec, shard = like._spec, sys.modules["torch.distributed.tensor"].Shard
    mesh = spec.mesh
    meta = type(spec.tensor_meta)(torch.Size([local.numel() * mesh.size()]), (1,), local.dtype)
    return type(like)(local, type(spec)(mesh, (shard(0),) * mesh.ndim, tensor_meta=meta), requires_grad=False)


def relaid(grads: Sequence[Any], specs: Sequence[Any]) -> list[Tensor]:
    """The local tensors of gradients, brought to other layouts on the same meshes.

    Sums that are still to be made, where nothing else differs, are made by one all_reduce for each process group and
    dtype.
    """
    results: list[Any] = [None] * len(grads)
    sums: dict[Any, tuple[Groups, list[int]]] = {}
    for place, (grad, spec) in enumerate(zip(grads, specs, strict=True)):
        groups = _only_to_be_summed(grad._spec, spec)
        local = local_part(grad)
        if groups is None or local is None:
            moved = grad.redistribute(spec.mesh, spec.placements)
            results[place] = local_part(moved)
        else:
            results[place] = local
            key = (*(group.group_name for group in groups), local.dtype, local.device)
            sums.setdefault(key, (groups, []))[1].append(place)
    for groups, places in sums.values():
        if not groups:
            continue
        flat = torch.cat([results[place].reshape(-1) for place in places])
        for group in groups:
            torch.distributed.all_reduce(flat, group=group)
        sizes = [results[place].numel() for place in places]
        for place, part in zip(places, torch.split(flat, sizes), strict=True):
            results[place] = part.view(results[place].shape)
    return results


def _only_to_be_summed(spec: Any, wanted: Any) -> Groups | None:
    """Over which groups a gradient has to be summed, if that is all that is missing."""
    groups = []
    for dim, (have, want) in enumerate(zip(spec.placements, wanted.placements, strict=True)):
        if have == want:
            continue
        if not (have.is_partial() and have.reduce_op == "sum" and want.is_replicate()):
            return None
        if spec.mesh.size(dim) > 1:
            groups.append(spec.mesh.get_group(dim))
    return tuple(groups)


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor, without autograd."""
    part = tensor if not is_dtensor(tensor) else local_part(tensor)
    found: Tensor = (tensor.to_local() if part is None else part).detach()
    return found


def local_grads(params: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of parameters, those of DTensors as what this process has of them in the parameter's layout. Where a
    gradient has another layout that is made by collectives, which the processes join alike."""
    grads = [p.grad for p in params]
    others = [
        place
        for place, (p, grad) in enumerate(zip(params, grads, strict=True))
        if is_dtensor(p) and is_dtensor(grad) and not is_alike(grad._spec, p._spec)
    ]
    relaid_parts = relaid([grads[place] for place in others], [params[place]._spec for place in others])
    parts = [None if grad is None else local(grad) for grad in grads]
    for place, part in zip(others, relaid_parts, strict=True):
        parts[place] = part
    return parts


def norm_of_parts(wholes: Sequence[Any], parts: Sequence[Tensor | None], norm_type: float = 2.0) -> Tensor:
    """The norm of tensors of which this process has ``parts``, as it has of ``wholes``: float64, shape ().

    All processes that have parts join, also those without some; it is the same on all.
    """
    buckets: dict[tuple[str, ...], tuple[Groups, list[Tensor]]] = {}
    for whole, part in zip(wholes, parts, strict=True):
        groups = sharding_groups(whole._spec) if is_dtensor(whole) else ()
        bucket = buckets.setdefault(tuple(group.group_name for group in groups), (groups, []))
        if part is not None:
            bucket[1].append(part.to_dense() if part.is_sparse else part)
    device = next((part.device for part in parts if part is not None), torch.device("cpu"))
    numbers = [_unfinished(tensors, norm_type, device) for _, tensors in buckets.values()]
    if not numbers:
        return torch.zeros((), dtype=torch.float64)
    there = reduction_device(whole._spec for whole in wholes if is_dtensor(whole))
    reduction = Reduction([groups for groups, _ in buckets.values()], there)
    reduced = reduction.largest if norm_type == math.inf else reduction.total
    return combined(reduced(torch.stack(numbers)), norm_type).to(device)


def _unfinished(tensors: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """What tensors contribute to a norm."""
    numbers = []
    for each in {tensor.device: None for tensor in tensors}:
        norms = torch.ops.optim_ext.norms([t for t in tensors if t.device == each], norm_type=norm_type)
        numbers.append(norms.square().to(device) if norm_type == 2.0 else norms.to(device))
    if not numbers:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat(numbers).amax() if norm_type == math.inf else torch.cat(numbers).sum()


class Reduction:
    """Numbers of which each process has its part, over process groups: one collective for each group, in an order that
    follows from the numbers asked for.

    Args:
        groups: for each number the process groups its parts are spread over.
        device: where a collective wants them.
    """

    def __init__(self, groups: Sequence[Groups], device: torch.device):
        self.device = device
        members: dict[str, tuple[Any, list[int]]] = {}
        for place, of in enumerate(groups):
            for group in of:
                members.setdefault(group.group_name, (group, []))[1].append(place)
        self._rounds = [
            (group, None if len(places) == len(groups) else torch.tensor(places, device=device))
            for group, places in members.values()
        ]

    def total(self, numbers: Tensor) -> Tensor:
        """The sums: float64 of shape (count, ...), as are the parts."""
        return self._over_groups(numbers, torch.distributed.ReduceOp.SUM)

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest; NaN where one of them is, which not every engine's maximum keeps."""
        if not self._rounds:
            return numbers
        bad = numbers.isnan()
        both = torch.stack([numbers.masked_fill(bad, math.inf), bad.to(numbers.dtype)], 1)
        found = self.largest_of_finite(both)
        return found[:, 0].masked_fill(found[:, 1] > 0, math.nan)

    def largest_of_finite(self, numbers: Tensor) -> Tensor:
        """The largest of numbers that are all finite."""
        return self._over_groups(numbers, torch.distributed.ReduceOp.MAX)

    def _over_groups(self, numbers: Tensor, how: Any) -> Tensor:
        numbers = numbers.to(self.device)
        for group, places in self._rounds:
            some = numbers if places is None else numbers[places]
            torch.distributed.all_reduce(some, op=how, group=group)
            if places is not None:
                numbers[places] = some
        return numbers


def reduction_device(specs: Iterable[Any]) -> torch.device:
    """Where collectives over these layouts want their numbers."""
    for spec in specs:
        kind = spec.mesh.device_type
        return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())
    return torch.device("cpu")


def combined(numbers: Tensor, norm_type: float) -> Tensor:
    """The norm that unfinished norms of parts come to: float64, shape ()."""
    if norm_type == math.inf:
        return numbers.amax()
    return numbers.sum().sqrt() if norm_type == 2.0 else numbers.sum()


class SpreadNorm:
    """The norm of gradients of which each process has parts.

    Args:
        params: for each parameter its local tensor, which has the local tensor of its gradient, and over which process
            groups it is cut.
        device: where the collectives want their numbers.
    """

    def __init__(self, params: Iterable[tuple[Tensor, Groups]], device: torch.device):
        buckets: dict[tuple[str, ...], tuple[Groups, list[Tensor]]] = {}
        self.device, self._there = torch.device("cpu"), device
        self.dtype = torch.float32
        for place, (param, groups) in enumerate(params):
            names = tuple(group.group_name for group in groups)
            buckets.setdefault(names, (groups, []))[1].append(param)
            if place == 0:
                self.device = param.device
            if param.dtype in (torch.float64, torch.complex128):
                self.dtype = torch.float64
        self._buckets = [params for _, params in buckets.values()]
        self._reduction = Reduction([groups for groups, _ in buckets.values()], device)
        every = {group.group_name: group for groups, _ in buckets.values() for group in groups}
        self._reduction_of_one = Reduction([tuple(every.values())], device)

    def largest(self, number: Tensor) -> Tensor:
        """The largest of a number that every process has, of those that share a parameter."""
        one = number.reshape(1).to(torch.float64)
        return self._reduction_of_one.largest(one).to(number.device, number.dtype).reshape(number.shape)

    def norm(self, norm_type: float, process_group: Any = None) -> Tensor:
        """The norm, the same on all processes: shape (), float64 if a parameter is, else float32. Without gradients, or
        with some on this process only, what is missing counts as zeros. ``process_group``: whose processes have other
        parameters, or other parts of them that no layout tells of, which belong to the norm."""
        if not self._buckets and process_group is None:
            return torch.zeros((), dtype=self.dtype)
        parts = [_C.unfinished_grad_norm([{"params": params}], norm_type).to(self.device) for params in self._buckets]
        numbers = torch.stack(parts) if parts else torch.zeros(1, dtype=torch.float64, device=self.device)
        reductions = [self._reduction] + ([Reduction([(process_group,)], self._there)] if process_group else [])
        for reduction in reductions:
            if norm_type == math.inf:
                numbers = reduction.largest(numbers).amax(0, keepdim=True)
            else:
                numbers = reduction.total(numbers).sum(0, keepdim=True)
        return combined(numbers, norm_type).to(self.device, self.dtype)
