"""What each process has of parameters of which some are DTensors, as the vectors of L-BFGS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from optim_ext import _sharding
from optim_ext._step.local_view import Agreement, GradKind, agree, grad_problem

T = TypeVar("T")

# Sums are taken of whole tiles (kHistoryTile in csrc/kernels/history.h).
_TILE = 1024
# What is kept as vectors. The rest of the state are numbers that all processes have.
_VECTORS = ("d", "prev_flat_grad", "old_dirs", "old_stps")


def why_whole(params: list[Any]) -> str | None:
    """Why DTensors are left to torch's code; None if they are not.

    Raises:
        RuntimeError: a parameter is a sum that has not been made (Partial).
    """
    mesh = None
    for index, p in enumerate(params):
        if not _sharding.is_dtensor(p):
            continue
        name, spec = f"parameter {index}", p._spec
        _sharding.refuse_partial(spec, name)
        if _sharding.local_part(p) is None:
            return f"{name}: its local tensor is a {type(p._local_tensor).__name__}, which has operations of its own"
        mesh = spec.mesh if mesh is None else mesh
        if spec.mesh != mesh:
            return f"{name}: it is on another mesh than the first DTensor"
        if mesh.get_coordinate() is None:
            return f"{name}: this process is not of its mesh"
    return None


class Parts:
    """A vector has first what this process counts in sums, then copies that another one counts: of elements that several
    processes have, the one with the lowest coordinates of the mesh. In between, and at the end, are as many zeros as make
    tiles full and vectors equally long on all processes, so that one of them is a DTensor of equal parts."""

    def __init__(self, params: list[Any], dtype: torch.dtype) -> None:
        self.params = params
        self._names = [f"parameter {index}" for index in range(len(params))]
        self._like = first = next(p for p in params if _sharding.is_dtensor(p))
        self.mesh = first._spec.mesh
        self.specs = [p._spec if _sharding.is_dtensor(p) else None for p in params]
        self.groups = _sharding.mesh_groups(first._spec)
        self.agreement = Agreement()
        self._meet = _sharding.reduction_device([first._spec])
        counts = [self._counts(spec) for spec in self.specs]
        self.order = sorted(range(len(params)), key=lambda i: not counts[i])
        numels = [_numel(_local(p)) for p in params]
        counted = sum(numel for numel, mine in zip(numels, counts, strict=True) if mine)
        copied = sum(numels) - counted
        between = -counted % _TILE
        longest = torch.tensor([float(max(1, counted + between + copied))], dtype=torch.float64)
        end = int(_sharding.Reduction([self.groups], self._meet).largest_of_finite(longest).item())
        self.counted = end if copied == 0 else counted + between
        zeros = (
            {sum(counts): between, len(params): end - counted - between - copied}
            if copied
            else {len(params): end - counted}
        )
        self._fillers = {place: torch.zeros(count, dtype=dtype, device=first.device) for place, count in zeros.items()}
        self._wrapped: dict[int, tuple[Tensor, Any]] = {}
        self.tensors = self._vector([_local(p).detach() for p in params])

    def _counts(self, spec: Any) -> bool:
        """Whether this process is the one that counts what it has of a parameter."""
        coordinate = self.mesh.get_coordinate()
        copied = range(self.mesh.ndim) if spec is None else _copied_over(spec)
        return all(coordinate[dim] == 0 for dim in copied)

    def _vector(self, each: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a vector, one after the other."""
        ordered = [each[index] for index in self.order]
        for place in sorted(self._fillers, reverse=True):
            ordered.insert(place, self._fillers[place])
        return ordered

    def in_order(self, each: Sequence[T], otherwise: T) -> list[T]:
        """Of each tensor of a vector what belongs to the parameter that it is of, or where it is none's the other."""
        ordered = [each[index] for index in self.order]
        for place in sorted(self._fillers, reverse=True):
            ordered.insert(place, otherwise)
        return ordered

    def look(self) -> list[Tensor]:
        """The tensors that this process has now, with their gradients.

        Raises:
            RuntimeError: a gradient is no DTensor, or on another mesh; processes that disagree all raise.
        """
        kinds, problems, wanted = [], {}, {}
        stand_ins = [_local(p).detach() for p in self.params]
        for index, (p, stand_in) in enumerate(zip(self.params, stand_ins, strict=True)):
            grad, spec = p.grad, self.specs[index]
            kind = GradKind.NONE if grad is None else GradKind.ALIKE
            if grad is None:
                pass
            elif spec is None:
                stand_in.grad = grad
            elif (problem := grad_problem(p, grad)) is not None:
                kind, problems[index] = GradKind.REFUSED, f"gradient of {self._names[index]}: {problem}"
            elif _sharding.is_alike(grad._spec, spec):
                stand_in.grad = _sharding.local_part(grad)
            else:
                kind, wanted[index] = GradKind.RELAID, grad
            kinds.append(kind)
        if self.agreement.is_due:
            agree(kinds, problems, [self.groups] * len(kinds), self._meet, self._names, self.agreement)
        for problem in problems.values():
            raise RuntimeError(problem)
        relaid = _sharding.relaid(list(wanted.values()), [self.specs[index] for index in wanted])
        for index, grad in zip(wanted, relaid, strict=True):
            stand_ins[index].grad = grad
        self.tensors = self._vector(stand_ins)
        return self.tensors

    def norm(self, norm_type: float) -> Tensor:
        """The norm of the gradients that were looked at last, of all processes' parts: shape ()."""
        cut = [() if spec is None else _sharding.sharding_groups(spec) for spec in self.specs]
        spread = _sharding.SpreadNorm(zip(self.tensors, self.in_order(cut, ()), strict=True), self._meet)
        return spread.norm(norm_type)

    def layout(self, p: Any) -> Any:
        """What has to stay as it is from step to step."""
        return None if not _sharding.is_dtensor(p) else (p._spec.placements, _local(p).shape)

    # State

    @property
    def numel(self) -> int:
        return sum(map(_numel, self.tensors))

    def local_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with this process's parts of vectors.

        Raises:
            RuntimeError: a vector is laid out otherwise.
        """
        return {key: self._unwrapped(key, value) if key in _VECTORS else value for key, value in state.items()}

    def _unwrapped(self, key: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self._unwrapped(key, each) for each in value]
        if not isinstance(value, Tensor):
            return value
        spec = getattr(value, "_spec", None)
        whole = self.numel * self.mesh.size()
        if (
            spec is None
            or spec.mesh != self.mesh
            or value.numel() != whole
            or not all(p.is_shard(0) for p in spec.placements)
        ):
            found = "no DTensor" if spec is None else _sharding.described(spec)
            raise RuntimeError(
                f"the state {key!r} of LBFGS ({found}, {value.numel()} numbers) is not that of these parameters, which is in "
                f"parts on a mesh of shape {tuple(self.mesh.shape)}, {whole} numbers; it goes on with as many processes as "
                "it was made by, and optimizer.state.clear() starts anew"
            )
        local = value._local_tensor  # type: ignore[attr-defined]
        self._wrapped[id(local)] = (local, value)
        return local

    def give(self, state: dict[str, Any], local: dict[str, Any]) -> None:
        """Bring the state up to date with what a step has made of this process's parts."""
        before, self._wrapped = self._wrapped, {}
        for key in [key for key in state if key not in local]:
            del state[key]
        for key, value in local.items():
            if key not in _VECTORS or value is None:
                state[key] = value
            elif isinstance(value, list):
                state[key] = [self._wrap(each, before) for each in value]
            else:
                state[key] = self._wrap(value, before)

    def _wrap(self, local: Tensor, before: dict[int, tuple[Tensor, Any]]) -> Any:
        known = before.get(id(local))
        if known is None or known[0] is not local:
            known = (local, _sharding.wrapped_rows(local, self._like))
        self._wrapped[id(local)] = known
        return known[1]


def _local(p: Any) -> Tensor:
    local = _sharding.local_part(p) if _sharding.is_dtensor(p) else p
    assert local is not None  # why_whole has seen it
    return local


def _numel(tensor: Tensor) -> int:
    return tensor.numel() * (2 if tensor.is_complex() else 1)


def _copied_over(spec: Any) -> list[int]:
    return [dim for dim, place in enumerate(spec.placements) if place.is_replicate()]
